"""What a forward knows belongs to it alone: threads, nested and interleaved forwards, and stopped ones."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import rectified_spaattn as rsa
import tiny
from schedule_runs import forwards_of, steps_of
from tiny import SPARSE, forward

pytestmark = pytest.mark.usefixtures("one_thread")

STOPS = [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ValueError]


@pytest.fixture
def model():
    return tiny.wan_transformer()


def two_pipelines():
    """Two pipelines with one set of weights and a scheduler each."""
    one = tiny.wan_pipeline()
    parts = {**one.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    other = WanPipeline(**parts, boundary_ratio=None)
    other.set_progress_bar_config(disable=True)
    return one, other


def in_step(*calls):
    """Runs each call in a thread of its own, all at once."""
    gate = threading.Barrier(len(calls))

    def start(call):
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(start, call) for call in calls]]


def take_turns(model, count):
    """Makes threads change places between the blocks: no two of `count` forwards run one after the other."""
    gate = threading.Barrier(count)

    def wait(*_):
        gate.wait(timeout=60)

    return [block.register_forward_pre_hook(wait) for block in model.blocks]


SIZES = [{"height": 64, "width": 128}, {"height": 128, "width": 64}]


def test_two_threads_on_one_transformer_with_a_scheduler_each(quiet):
    one, other = two_pipelines()
    with rsa.enable(one, **{**SPARSE, "order": "gilbert"}) as handle:
        alone = [tiny.run_wan(pipe, steps=3, **size) for pipe, size in zip((one, other), SIZES, strict=True)]
        calls = handle.stats().sparse_calls
        hooks = take_turns(one.transformer, 2)
        together = in_step(
            lambda: tiny.run_wan(one, steps=3, **SIZES[0]),
            lambda: tiny.run_wan(other, steps=3, **SIZES[1]),
        )
        for hook in hooks:
            hook.remove()
        assert handle.stats().dense_calls == 0
        assert calls <= handle.stats().sparse_calls <= 2 * calls
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


def test_two_threads_cannot_share_a_warm_up():
    one, other = two_pipelines()
    with rsa.enable(one, **{**SPARSE, "dense_steps": 1}):
        tiny.run_wan(one, steps=3)
        one.scheduler.set_timesteps(4)
        forward(one.transformer, {**tiny.wan_inputs(), "timestep": one.scheduler.timesteps[:1]})
        with pytest.raises(RuntimeError, match=r"began in another thread.*without dense steps"):
            in_step(lambda: tiny.run_wan(other, steps=3))
        # one run after the other, each in a thread of its own, is no conflict
        log = forwards_of(one.transformer)
        in_step(lambda: tiny.run_wan(one, steps=3))
        in_step(lambda: tiny.run_wan(one, steps=3))
        assert steps_of(log) == "dssdss"


def test_many_threads_count_every_call(model):
    inputs = tiny.wan_inputs()
    with rsa.enable(model, **SPARSE) as handle:
        want = forward(model, inputs)
        outputs = in_step(*[lambda: [forward(model, inputs) for _ in range(5)] for _ in range(4)])
        assert handle.stats().sparse_calls == 3 * 21
        assert handle.stats().forwards == 21
    assert all(torch.equal(each, want) for several in outputs for each in several)


@torch.no_grad()
def take_turns_step_by_step(pipelines, steps):
    inputs = tiny.wan_inputs(batch=1)
    for pipe, count in zip(pipelines, steps, strict=True):
        pipe.scheduler.set_timesteps(count)
    for timesteps in zip(*[pipe.scheduler.timesteps for pipe in pipelines], strict=False):
        for pipe, timestep in zip(pipelines, timesteps, strict=True):
            out = pipe.transformer(**{**inputs, "timestep": timestep[None]}).sample
            pipe.scheduler.step(out, timestep, inputs["hidden_states"])


def test_pipelines_that_take_turns_run_sparse_and_cannot_share_a_warm_up(quiet):
    """In one thread, step by step: the scheduler of the enabled one says nothing of the other's steps."""
    one, other = two_pipelines()
    with rsa.enable(one, **SPARSE) as handle:
        take_turns_step_by_step((one, other), (4, 7))
        assert handle.stats().dense_calls == 0
    with (
        rsa.enable(one, **{**SPARSE, "dense_steps": 1}),
        pytest.raises(RuntimeError, match=r"pipelines take turns on the transformer.*without dense steps"),
    ):
        take_turns_step_by_step((one, other), (4, 7))


@pytest.mark.parametrize("order", ["gilbert", "content"])
def test_a_forward_inside_a_forward(model, order, quiet):
    large, small = tiny.wan_inputs(), tiny.wan_inputs(grid=(2, 4, 12))
    settings = {**SPARSE, "order": order}
    with rsa.enable(model, **settings) as handle:
        alone = [forward(model, inputs) for inputs in (large, small)]
        inner = []

        def inside(*_):
            if not inner:
                inner.append(None)
                inner[0] = forward(model, small)

        model.blocks[1].register_forward_pre_hook(inside)
        outer = forward(model, large)
        assert torch.equal(outer, alone[0])
        assert torch.equal(inner[0], alone[1])
        assert handle.stats().sparse_calls == 12


@pytest.mark.parametrize("stop", STOPS)
def test_an_inner_forward_that_was_stopped_leaves_the_outer_one_as_it_is(model, stop):
    large, small = tiny.wan_inputs(), tiny.wan_inputs(grid=(2, 4, 12))
    with rsa.enable(model, **{**SPARSE, "order": "gilbert"}):
        alone = forward(model, large)
        depth = []

        def inside(*_):
            if depth:
                raise stop
            depth.append(None)
            with pytest.raises(stop):
                forward(model, small)
            depth.append(None)

        hook = model.blocks[1].register_forward_pre_hook(inside)
        assert torch.equal(forward(model, large), alone)
        hook.remove()


def test_a_forward_of_another_model_inside_a_processor_call(model):
    other, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **SPARSE) as handle, rsa.enable(other, **SPARSE) as inner:
        alone = forward(model, inputs)
        model.blocks[1].attn1.to_q.register_forward_pre_hook(lambda *_: (forward(other, inputs), None)[1])
        with torch.no_grad():
            assert torch.equal(model(**inputs).sample, alone)
        assert (handle.stats().sparse_calls, inner.stats().sparse_calls) == (6, 3)


@pytest.mark.parametrize("stop", STOPS)
def test_after_a_stopped_forward_nothing_of_it_is_read(model, stop):
    inputs, other = tiny.wan_inputs(), tiny.wan_inputs(grid=(2, 4, 12))
    untouched = [forward(model, each) for each in (inputs, other)]
    with rsa.enable(model, **SPARSE) as handle:
        sparse = [forward(model, each) for each in (inputs, other)]
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: raise_(stop))
        with pytest.raises(stop):
            forward(model, inputs)
        hook.remove()
        for each, want in zip((inputs, other), untouched, strict=True):
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                assert torch.equal(model.forward(**each).sample, want)
        assert [forward(model, each).equal(want) for each, want in zip((inputs, other), sparse, strict=True)]
        assert handle.stats().dense_reasons == {"a call outside of the transformer's forward": 6}
        assert handle.stats().skipped == 0
    assert torch.equal(forward(model, inputs), untouched[0])


def raise_(error):
    raise error


def test_a_direct_forward_is_full_attention_and_said_once(model):
    inputs = tiny.wan_inputs()
    untouched = forward(model, inputs)
    with rsa.enable(model, **SPARSE) as handle, torch.no_grad():
        model(**tiny.wan_inputs(grid=(2, 4, 12)))
        with pytest.warns(UserWarning, match=r"outside of a call of its transformer.*Call transformer\(\.\.\.\)"):
            assert torch.equal(model.forward(**inputs).sample, untouched)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="rectified_spaattn")
            assert torch.equal(model.forward(**inputs).sample, untouched)
        stats = handle.stats()
        assert (stats.sparse_calls, stats.dense_calls, stats.skipped) == (3, 6, 0)
        assert "outside of the transformer's forward" in handle.summary()


def test_a_block_by_itself_is_full_attention(model):
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args))
    inputs = tiny.wan_inputs()
    forward(model, inputs)
    with torch.no_grad():
        untouched = model.blocks[0](*seen[0])
        with rsa.enable(model, **SPARSE) as handle:
            forward(model, inputs)
            with pytest.warns(UserWarning, match="outside of a call"):
                assert torch.equal(model.blocks[0](*seen[0]), untouched)
            assert handle.stats().layers[0].dense_calls == 1


def test_disabled_in_the_middle_of_a_forward(model):
    inputs = tiny.wan_inputs()
    untouched = forward(model, inputs)
    handle = rsa.enable(model, **SPARSE)
    model.blocks[1].register_forward_pre_hook(lambda *_: handle.disable())
    forward(model, inputs)
    assert handle.stats().sparse_calls == 1
    assert torch.equal(forward(model, inputs), untouched)


@pytest.mark.parametrize("at", ["hook", "first processor", "last processor"])
def test_enabling_that_is_interrupted_leaves_nothing(model, at, monkeypatch):
    before, inputs = model.attn_processors, tiny.wan_inputs()
    untouched = forward(model, inputs)
    if at == "hook":
        monkeypatch.setattr(model, "register_forward_hook", lambda *_, **__: raise_(KeyboardInterrupt))
    else:
        block = model.blocks[0 if at == "first processor" else 2]
        setting = block.attn1.set_processor
        monkeypatch.setattr(block.attn1, "set_processor", lambda p: (setting(p), stop_once(block.attn1, setting)))
    with pytest.raises(KeyboardInterrupt):
        rsa.enable(model, **SPARSE)
    assert all(model.attn_processors[name] is before[name] for name in before)
    assert not model._forward_pre_hooks
    assert torch.equal(forward(model, inputs), untouched)


@pytest.mark.filterwarnings("error")
def test_enabling_that_warns_where_warnings_are_errors_leaves_nothing(model):
    with pytest.raises(UserWarning, match="needs the denoising step"):
        rsa.enable(model, **{**SPARSE, "dense_steps": 1})
    assert not model._forward_pre_hooks
    rsa.enable(model, **SPARSE).disable()


def stop_once(module, setting):
    vars(module)["set_processor"] = setting
    raise KeyboardInterrupt


@pytest.mark.parametrize("block", [0, 1, 2])
def test_disabling_that_is_interrupted_is_off_at_once_and_ends_at_the_next_try(model, block, monkeypatch):
    before, inputs = model.attn_processors, tiny.wan_inputs()
    untouched = forward(model, inputs)
    handle = rsa.enable(model, **SPARSE)
    attention = model.blocks[block].attn1
    with monkeypatch.context() as patch:
        patch.setattr(attention, "set_processor", lambda _: raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            handle.disable()
    assert torch.equal(forward(model, inputs), untouched)
    rsa.disable(model)
    assert all(model.attn_processors[name] is before[name] for name in before)
    assert not model._forward_pre_hooks
