"""What the handle follows, and what it says when that is no longer so: replaced transformers, pipelines, told steps."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline

import rectified_spaattn as rsa
import tiny
from schedule_runs import EMBEDS, fail, forwards_of, run_video, steps_of, stop_after, video_to_video
from tiny import SPARSE, forward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline():
    return tiny.wan_pipeline()


# a transformer in place of the enabled one


def test_a_replaced_transformer_is_said_when_the_pipeline_runs(pipeline):
    untouched = tiny.run_wan(pipeline)
    with rsa.enable(pipeline, **SPARSE) as handle:
        tiny.run_wan(pipeline)
        assert "REPLACED" not in handle.summary()
        old, pipeline.transformer = pipeline.transformer, tiny.wan_transformer()
        with pytest.warns(UserWarning, match=r"transformer of the pipeline is another object.*enable again"):
            assert torch.equal(tiny.run_wan(pipeline), untouched)
        with warnings.catch_warnings():  # said once
            warnings.filterwarnings("error", message="rectified_spaattn")
            assert torch.equal(tiny.run_wan(pipeline), untouched)
        assert "REPLACED: transformer of the pipeline" in handle.summary()
        pipeline.transformer = old
        assert "REPLACED" not in handle.summary()
    assert "REPLACED" not in handle.summary()


def test_a_replaced_transformer_is_said_without_a_prompt_to_encode(pipeline):
    with rsa.enable(pipeline, **SPARSE):
        pipeline.transformer = tiny.wan_transformer()
        with pytest.warns(UserWarning, match="transformer of the pipeline is another object"):
            tiny.run_wan(pipeline, prompt=None, negative_prompt=None, output_type="pt", **EMBEDS)
    assert not pipeline.vae.decoder._forward_pre_hooks


def test_one_of_two_experts_is_replaced():
    pipeline = tiny.wan_pipeline(experts=2)
    with rsa.enable(pipeline, **SPARSE):
        pipeline.transformer_2 = copy.deepcopy(pipeline.transformer_2)
        with pytest.warns(UserWarning, match="transformer_2 of the pipeline is another object"):
            tiny.run_wan(pipeline, steps=8)


@pytest.mark.parametrize("how", ["compiled", "taken out", "enabled, too", "the same"])
def test_a_transformer_that_is_still_sparse_or_gone_raises_no_alarm(pipeline, quiet, how):
    with rsa.enable(pipeline, **SPARSE) as handle:
        if how == "compiled":
            pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        elif how == "enabled, too":
            pipeline.transformer = tiny.wan_transformer()
            rsa.enable(pipeline.transformer, **SPARSE)
        elif how == "taken out":
            pipeline.transformer, kept = None, pipeline.transformer
            pipeline.encode_prompt("a", max_sequence_length=12)
            pipeline.transformer = kept
        tiny.run_wan(pipeline)
        assert "REPLACED" not in handle.summary()


# the pipeline that the steps come from


def from_pipe(pipeline):
    made = WanVideoToVideoPipeline.from_pipe(pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipeline_made_from_the_enabled_one_warms_up(pipeline, quiet):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1}):
        log = forwards_of(pipeline.transformer)
        run_video(from_pipe(pipeline), steps=4, strength=1.0)
        assert steps_of(log) == "dsss"


def test_a_collected_pipeline_is_named_with_the_remedy():
    pipeline = tiny.wan_pipeline()
    handle = rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1})
    made = from_pipe(pipeline)
    del pipeline
    gc.collect()
    log = forwards_of(made.transformer)
    with pytest.warns(UserWarning, match=r"dense_steps=1 needs.*WanPipeline that was enabled.*is gone.*enable on the"):
        run_video(made, steps=4, strength=1.0)
    assert steps_of(log) == "ssss"
    handle.disable()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rectified_spaattn")
        rsa.enable(made, **{**SPARSE, "dense_steps": 1})
        run_video(made, steps=4, strength=1.0)
    assert steps_of(log) == "dsss"


def test_a_collected_pipeline_matters_to_a_schedule_alone(quiet):
    pipeline = tiny.wan_pipeline()
    handle = rsa.enable(pipeline, **SPARSE)
    made = from_pipe(pipeline)
    del pipeline
    gc.collect()
    run_video(made, steps=4, strength=1.0)
    assert handle.stats().dense_calls == 0


def test_ddim_left_in_the_middle_by_one_pipeline_and_driven_by_another(pipeline):
    """current_timestep of the enabled pipeline stands still: not dense for ever."""
    enabled = video_to_video(pipeline.components, scheduler=DDIMScheduler())
    other = video_to_video({**pipeline.components, "scheduler": enabled.scheduler})
    with rsa.enable(enabled, **{**SPARSE, "dense_steps": 1}):
        with pytest.raises(KeyboardInterrupt):
            run_video_until(enabled, 1)
        log = forwards_of(pipeline.transformer)
        with pytest.warns(UserWarning, match="rectified_spaattn: dense_steps=1 needs"):
            run_video(other, steps=6, strength=1.0)
        assert steps_of(log).endswith("sssss")


def run_video_until(pipeline, step):
    class Stopping(type(pipeline.scheduler)):
        def step(self, *args, **kwargs):
            if pipeline.scheduler.count == step:
                raise KeyboardInterrupt
            pipeline.scheduler.count += 1
            return super().step(*args, **kwargs)

    kept = type(pipeline.scheduler)
    pipeline.scheduler.__class__, pipeline.scheduler.count = Stopping, 0
    try:
        run_video(pipeline, steps=6, strength=1.0)
    finally:
        pipeline.scheduler.__class__ = kept


# told steps


def test_a_pipeline_warms_up_after_a_told_step(pipeline, quiet):
    inputs = tiny.wan_inputs(batch=1)
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle:
        log = forwards_of(pipeline.transformer)
        for step, kind in ((5, "s"), (0, "d"), (1, "d"), (7, "s")):
            handle.set_step(step, 8)
            for _ in range(2):  # it holds until something ends it
                forward(pipeline.transformer, inputs)
                assert log.pop() == kind
        for _ in range(2):
            tiny.run_wan(pipeline, steps=4)
            assert steps_of(log) == "ddss"
            assert handle.stats().steps == 4


def test_a_told_step_ends_where_the_user_says_so(pipeline, quiet):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle:
        log = forwards_of(pipeline.transformer)
        handle.set_step(6, 8)
        handle.set_step(None)
        tiny.run_wan(pipeline, steps=4)
        assert steps_of(log) == "ddss"
        assert handle.stats().steps == 4


def test_a_told_step_before_an_interrupted_run(pipeline, quiet):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle:
        log = forwards_of(pipeline.transformer)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline, steps=4, callback_on_step_end=stop_after(1, fail))
        log.clear()
        handle.set_step(3, 4)
        forward(pipeline.transformer, tiny.wan_inputs(batch=1))
        assert log == ["s"]
        log.clear()
        tiny.run_wan(pipeline, steps=4)
        assert steps_of(log) == "ddss"


def test_a_loop_of_ones_own_may_tell_every_step(pipeline, quiet):
    inputs, scheduler = tiny.wan_inputs(batch=1), pipeline.scheduler
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": 2}) as handle, torch.no_grad():
        log = forwards_of(pipeline.transformer)
        for _ in range(2):
            scheduler.set_timesteps(4)
            for step, timestep in enumerate(scheduler.timesteps):
                handle.set_step(step, 4)
                out = pipeline.transformer(**{**inputs, "timestep": timestep[None]}).sample
                scheduler.step(out, timestep, inputs["hidden_states"])
            assert steps_of(log, forwards=1) == "ddss"
            assert handle.stats().forwards == 4


def test_a_transformer_alone_forgets_a_told_step():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with pytest.warns(UserWarning, match="dense_steps=2 needs the denoising step"):
        handle = rsa.enable(model, **{**SPARSE, "dense_steps": 2})
    handle.set_step(np.int64(0), np.int64(8))
    forward(model, inputs)
    assert handle.stats().dense_reasons == {"dense_steps": 3}
    handle.set_step(None)
    forward(model, inputs)
    assert handle.stats().sparse_calls == 3
    with pytest.raises(ValueError, match=r"step: got 1\.0"):
        handle.set_step(1.0)
    with pytest.raises(ValueError, match="total: got 8"):
        handle.set_step(None, 8)


# dense last steps


@pytest.mark.parametrize(
    ("first", "last", "steps", "pattern"),
    [
        (0, 1, 4, "sssd"),
        (1, 2, 6, "dsssdd"),
        (0.25, 0.25, 8, "ddssssdd"),
        (0, 0.1, 4, "ssss"),
        (0, np.int64(2), 3, "sdd"),
    ],
)
def test_the_last_steps_are_dense(pipeline, quiet, first, last, steps, pattern):
    with rsa.enable(pipeline, **{**SPARSE, "dense_steps": first, "dense_last_steps": last}) as handle:
        log = forwards_of(pipeline.transformer)
        for _ in range(2):
            tiny.run_wan(pipeline, steps=steps)
            assert steps_of(log) == pattern
        dense_last = len(pattern) - len(pattern.rstrip("d"))
        assert handle.stats().dense_reasons.get("dense_last_steps", 0) == 6 * dense_last


def test_last_steps_of_a_run_that_begins_inside_the_schedule(pipeline, quiet):
    made = video_to_video(pipeline.components)
    with rsa.enable(made, **{**SPARSE, "dense_last_steps": 1}):
        log = forwards_of(made.transformer)
        run_video(made, steps=8, strength=0.5)
        assert steps_of(log) == "sssd"


def test_first_and_last_steps_that_leave_nothing_sparse(pipeline):
    with (
        rsa.enable(pipeline, **{**SPARSE, "dense_steps": 1, "dense_last_steps": 3}),
        pytest.warns(UserWarning, match=r"nothing runs sparse.*dense_steps=1 and dense_last_steps=3 is 4 dense"),
    ):
        tiny.run_wan(pipeline, steps=4)


def test_last_steps_need_the_step(pipeline):
    model = tiny.wan_transformer()
    with pytest.warns(UserWarning, match="dense_last_steps=1 needs the denoising step"):
        handle = rsa.enable(model, **{**SPARSE, "dense_last_steps": 1})
    handle.set_step(2)
    with pytest.warns(UserWarning, match="dense_last_steps=1 needs the number of steps"):
        forward(model, tiny.wan_inputs())
    assert handle.stats().sparse_calls == 3
    handle.set_step(2, 3)
    forward(model, tiny.wan_inputs())
    assert handle.stats().dense_reasons == {"dense_last_steps": 3}


# experts


def expert(number):
    """A Wan 2.2 pipeline with one of its two experts."""
    parts = tiny.wan_pipeline(experts=2).components
    other = "transformer_2" if number == 1 else "transformer"
    pipe = WanPipeline(**{**parts, other: None}, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("number", [1, 2])
def test_one_expert_gets_its_own_config(number):
    pipe, name = expert(number), "transformer" if number == 1 else "transformer_2"
    both = rsa.preset("wan2.2-t2v-a14b")
    assert both[0] != both[1]
    with rsa.enable(pipe) as handle:
        assert handle.configs() == {name: both[number - 1]}
    with rsa.enable(pipe, preset="wan2.2-t2v-a14b-paper", sparsity=0.5) as handle:
        assert handle.configs() == {name: rsa.preset("wan2.2-t2v-a14b-paper")[number - 1].replace(sparsity=0.5)}
    with pytest.raises(ValueError, match="2 configs for 1 transformer"):
        rsa.enable(pipe, both)


def test_the_second_expert_alone_runs_sparse(quiet):
    pipe = WanPipeline(**expert(2).components, boundary_ratio=1.1)
    pipe.set_progress_bar_config(disable=True)
    with rsa.enable(pipe, **{**SPARSE, "dense_steps": 1}):
        log = forwards_of(pipe.transformer_2)
        tiny.run_wan(pipe, steps=4)
        assert steps_of(log) == "dsss"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/cache/models--Wan-AI--Wan2.2-T2V-A14B-Diffusers/snapshots/1/transformer", 1),
        ("/cache/models--Wan-AI--Wan2.2-T2V-A14B-Diffusers/snapshots/1/transformer_2", 2),
        ("my-model/transformer_2/", 2),
    ],
)
def test_an_expert_by_itself_is_known_by_its_checkpoint(path, number):
    model = tiny.wan_transformer()
    model.register_to_config(_name_or_path=path)
    with pytest.warns(UserWarning, match="set_step"), rsa.enable(model) as handle:
        assert handle.configs() == {"transformer": rsa.preset("wan2.2-t2v-a14b")[number - 1]}


def test_one_model_in_two_places_is_enabled_once(quiet):
    pipe = tiny.wan_pipeline(experts=2)
    pipe.transformer_2 = pipe.transformer
    untouched = tiny.run_wan(pipe, 4)
    with rsa.enable(pipe, **tiny.SPARSE) as handle, rsa.enable_teacache(pipe):
        tiny.run_wan(pipe, 4)
        stats = handle.stats()
        assert (stats.steps, stats.forwards, stats.sparse_calls) == (4, 8, 24)
        assert "LOST" not in handle.summary()
    assert torch.equal(tiny.run_wan(pipe, 4), untouched)


def test_an_expert_by_itself_of_unknown_kind_is_asked_for():
    model = tiny.wan_transformer(num_layers=40)
    with pytest.raises(ValueError, match=r"Wan 2\.1 14B or an expert of Wan 2\.2.*preset='wan2\.1-t2v'"):
        rsa.enable(model)
    with pytest.raises(ValueError, match=r"config for each of two experts.*rsa\.preset\(name\)\[0\]"):
        rsa.enable(model, preset="wan2.2-t2v-a14b")
    with pytest.raises(ValueError, match="preset: got ''"):
        rsa.enable(model, preset="")
    with pytest.warns(UserWarning, match="set_step"), rsa.enable(model, rsa.preset("wan2.2-t2v-a14b")[1]) as handle:
        assert handle.configs()["transformer"] == rsa.preset("wan2.2-t2v-a14b")[1]
    with rsa.enable(tiny.wan_transformer(num_layers=40, in_channels=36)) as handle:
        assert handle.configs()["transformer"] == rsa.preset("wan2.2-i2v-a14b")[0]


def test_schedulers_and_wan21_are_as_before(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with rsa.enable(pipeline) as handle:
        assert handle.configs() == {"transformer": rsa.preset("wan2.1-t2v")[0]}
