"""Which step it is: schedulers, runs that begin inside the schedule, pipelines that share a scheduler or a model."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)

import rectified_spaattn as rsa
import tiny
from schedule_runs import fail, forwards_of, run_video, steps_of, stop_after, video_to_video
from tiny import SPARSE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline():
    return tiny.wan_pipeline()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        FlowMatchHeunDiscreteScheduler(shift=7.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_step_is_a_step_with_every_scheduler(pipeline, quiet, scheduler):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}) as handle:
        pipeline.scheduler = scheduler  # exchanged after enabling
        log = forwards_of(pipeline.transformer)
        for steps in (3, 4):
            tiny.run_wan(pipeline, steps=steps)
            # Heun calls the model twice a step, once in the last
            want = "d" + "s" * (steps - 1) if scheduler.order == 1 else "dd" + "s" * (2 * steps - 3)
            assert steps_of(log) == want
            assert handle.stats().steps == steps


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(shift=7.0), FlowMatchHeunDiscreteScheduler(shift=7.0), DDIMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("dense_steps", [1, 0.25])
def test_a_run_that_begins_inside_the_schedule(pipeline, quiet, strength, scheduler, dense_steps):
    pipeline = video_to_video(pipeline.components, scheduler=scheduler)
    every = 8 if dense_steps == 0.25 else 4  # as a count, one step is dense however many there are
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": dense_steps, "order": "gilbert"}) as handle:
        log = forwards_of(pipeline.transformer)
        for _ in range(2):
            run_video(pipeline, steps=every, strength=strength)
            steps = int(every * strength)
            dense = 1 if dense_steps == 1 else steps // 4
            order = scheduler.order
            assert steps_of(log) == "d" * (dense * order) + "s" * ((steps - dense) * order - (order - 1))
            assert handle.stats().steps == steps


def test_a_pipeline_that_shares_the_scheduler_of_the_enabled_one(pipeline, quiet):
    other = video_to_video(pipeline.components)
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}):
        log = forwards_of(pipeline.transformer)
        run_video(other, steps=8, strength=0.5)
        assert steps_of(log) == "dsss"
        tiny.run_wan(pipeline, steps=3)
        assert steps_of(log) == "dss"
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline, steps=8, callback_on_step_end=stop_after(1, fail))
        log.clear()
        run_video(other, steps=8, strength=0.5)
        assert steps_of(log) == "dsss"


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_pipeline_with_another_scheduler_is_reported(pipeline, ran_before):
    other = video_to_video(pipeline.components, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}) as handle:
        if ran_before:
            tiny.run_wan(pipeline, steps=3)
        log = forwards_of(pipeline.transformer)
        with pytest.warns(UserWarning, match="another pipeline or scheduler drives.*Enable on the pipeline you call"):
            run_video(other, steps=4, strength=1.0)
        assert "ss" in steps_of(log)
        handle.disable()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rectified_spaattn")
        with rsa.enable(other, **{**SPARSE, "dense_steps": 1}):
            log = forwards_of(pipeline.transformer)
            run_video(other, steps=4, strength=1.0)
            assert steps_of(log) == "dsss"


def test_two_enabled_pipelines_share_a_scheduler(quiet):
    first, second = tiny.wan_pipeline(), tiny.wan_pipeline()
    second.scheduler = first.scheduler
    with (
        rsa.enable(first, **{**SPARSE, "dense_steps": 1}) as a,
        rsa.enable(second, **{**SPARSE, "dense_steps": 2}) as b,
    ):
        logs = [forwards_of(pipe.transformer) for pipe in (first, second)]
        for steps in (3, 4):
            tiny.run_wan(first, steps=steps)
            tiny.run_wan(second, steps=steps)
            assert [steps_of(log) for log in logs] == ["d" + "s" * (steps - 1), "dd" + "s" * (steps - 2)]
            assert a.stats().steps == b.stats().steps == steps


def test_a_pipeline_that_sets_begin_index(pipeline, quiet):
    inputs, scheduler = tiny.wan_inputs(batch=1), pipeline.scheduler
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 0.25}), torch.no_grad():
        log = forwards_of(pipeline.transformer)
        for _ in range(2):
            scheduler.set_timesteps(12)
            scheduler.set_begin_index(4)
            for timestep in scheduler.timesteps[4:]:
                out = pipeline.transformer(**{**inputs, "timestep": timestep[None]}).sample
                scheduler.step(out, timestep, inputs["hidden_states"])
            assert steps_of(log, forwards=1) == "ddssssss"


def test_a_timestep_for_each_frame_tells_no_step(pipeline):
    # as diffusion forcing does: pipeline.current_timestep is a vector, and the pipeline's own scheduler rests
    inputs = tiny.wan_inputs(batch=1)
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}), torch.no_grad():
        log = forwards_of(pipeline.transformer)
        pipeline.scheduler.set_timesteps(4)

        def step(timestep):
            pipeline._current_timestep = timestep * torch.tensor([1.0, 0.5, 0.25])
            pipeline.transformer(**{**inputs, "timestep": timestep[None]})

        first, second, *others = pipeline.scheduler.timesteps
        step(first)
        with pytest.warns(UserWarning, match="or one for each frame"):
            step(second)
        for timestep in others:
            step(timestep)
        assert steps_of(log, forwards=1) == "dsss"


def test_the_pipeline_may_go_away_but_not_unnoticed():
    pipeline = tiny.wan_pipeline()
    rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1})
    components = pipeline.components
    del pipeline
    with pytest.warns(UserWarning, match="pipeline"):
        tiny.run_wan(WanPipeline(**components, boundary_ratio=None), steps=2)
