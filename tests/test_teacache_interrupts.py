"""TeaCache where a forward is stopped, by whatever and anywhere."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rectified_spaattn as rsa
import tiny
from rectified_spaattn.pipelines.teacache import transformer as seam
from teacache_cases import HUGE, MODELS, at_step, blocks_of, forward, walk

pytestmark = pytest.mark.usefixtures("one_thread")

STOPS = [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, MemoryError]


@pytest.fixture(scope="module")
def untouched():
    """What each model gives without TeaCache, in 8 steps and in 2."""
    return {name: [walk(make(), inputs(), None, total=n) for n in (8, 2)] for name, (make, inputs) in MODELS.items()}


def stopping(stop):
    def hook(*_):
        raise stop

    return hook


def places(model):
    """Modules that run before, in and after the blocks."""
    blocks = blocks_of(model)
    return [next(iter(model.children())), blocks[0].norm1, blocks[0], blocks[-1], model.proj_out]


def assert_whole(model, before):
    assert set(vars(model)) - {"_diffusers_hook"} == before - {"_diffusers_hook"}
    assert all(isinstance(getattr(model, name), nn.Module) for name, _ in model.named_children())


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "cogvideox"])
def test_a_stop_in_any_module_leaves_a_model_that_disable_restores(untouched, name, stop):
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    before = set(vars(model))
    for place in places(model):
        for step in (0, 6):  # the blocks run; they are left out first, and then they run
            handle = rsa.enable_teacache(model, threshold=0)
            for earlier in range(step):
                handle.set_step(earlier, 8)
                forward(model, at_step(inputs, earlier, 8))
            handle.set_step(step, 8)
            hook = place.register_forward_hook(stopping(stop))
            with pytest.raises(stop):
                forward(model, at_step(inputs, step, 8))
            hook.remove()
            assert handle.stats().steps == step  # the stopped one does not count
            handle.disable()
            assert_whole(model, before)
            assert torch.equal(walk(model, inputs, None, total=2), untouched[name][1])


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_nothing_of_a_stopped_forward_is_used_again(untouched, name):
    """Still enabled: the same step made again is computed, and the lists of blocks are the model's own."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    blocks = blocks_of(model)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        for step in range(7):
            handle.set_step(step, 8)
            forward(model, at_step(inputs, step, 8))
        hook = model.proj_out.register_forward_hook(stopping(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forward(model, at_step(inputs, 6, 8))
        hook.remove()
        assert blocks_of(model) == blocks
        with torch.no_grad():  # past our seam: the model's own forward, with all of its blocks
            assert torch.equal(model.forward(**at_step(inputs, 6, 8)).sample, untouched[name][0][6])
        assert torch.equal(forward(model, at_step(inputs, 6, 8)), untouched[name][0][6])
        assert handle.stats().branches[0].skipped_steps == tuple(range(5 if name == "wan" else 1, 7))


FOLDER = str(Path(seam.__file__).parent)


def interrupted_at(count, function, *args):
    """Call it with a KeyboardInterrupt at the count-th line of our code; whether there are so many."""
    left = [count]

    def line(frame, event, _):
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename.startswith(FOLDER) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function(*args)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("step", [0, 5, 7], ids=["computed", "left out", "last"])
def test_an_interrupt_at_every_line_of_our_code(untouched, step):
    """As Ctrl-C does it: between any two lines, our clean-up included."""
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    before = set(vars(model))
    count = 0
    while True:
        handle = rsa.enable_teacache(model, threshold=HUGE)
        for earlier in range(step):
            handle.set_step(earlier, 8)
            forward(model, at_step(inputs, earlier, 8))
        handle.set_step(step, 8)
        stopped = interrupted_at(count, forward, model, at_step(inputs, step, 8))
        if stopped and count % 2:  # enabled still: whatever is left does not outlive the next forward
            handle.set_step(7, 8)
            assert torch.equal(forward(model, at_step(inputs, 7, 8)), untouched["wan"][0][7])
        handle.disable()
        assert_whole(model, before)
        assert torch.equal(forward(model, at_step(inputs, 0, 8)), untouched["wan"][0][0])
        if not stopped:
            break
        count += 11 if step else 4
    assert count > 40


def test_an_interrupt_at_every_line_of_enable_and_disable(untouched):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    before = set(vars(model))
    stopped, count = True, 0
    while stopped:
        stopped = interrupted_at(count, rsa.enable_teacache, model)
        if "_call_impl" in vars(model):  # it was on its way back to the caller
            assert rsa.disable_teacache(model)
        assert_whole(model, before)
        count += 2
    assert count > 40
    stopped, count = True, 0
    while stopped:
        handle = rsa.enable_teacache(model)
        stopped = interrupted_at(count, handle.disable)
        handle.disable()
        assert_whole(model, before)
        count += 1
    assert count > 15
    assert torch.equal(forward(model, at_step(inputs, 0, 8)), untouched["wan"][0][0])


def test_an_interrupted_enable_leaves_nothing(monkeypatch):
    pipeline = tiny.wan_pipeline(experts=2)
    before = [set(vars(model)) for model in (pipeline.transformer, pipeline.transformer_2)]
    install = seam.CachedTransformer.install

    def stop(self):
        install(self)
        if self.name == "transformer_2":
            raise KeyboardInterrupt

    monkeypatch.setattr(seam.CachedTransformer, "install", stop)
    with pytest.raises(KeyboardInterrupt):
        rsa.enable_teacache(pipeline)
    for model, names in zip((pipeline.transformer, pipeline.transformer_2), before, strict=True):
        assert_whole(model, names)
    monkeypatch.undo()
    rsa.enable_teacache(pipeline).disable()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_a_stop_in_compiled_code(fresh_compiler, untouched, whole):
    stops = [None]

    def backend(graph, _):
        def run(*args):
            if stops[0] is not None:
                raise stops[0]
            return graph(*args)

        return run

    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    if whole:
        called = torch.compile(model, fullgraph=True, backend=backend)
    else:
        called = model
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with rsa.enable_teacache(called, threshold=HUGE) as handle:
        cached = walk(called, inputs, handle)
        for stop in STOPS:
            handle.set_step(0, 8)
            stops[0] = stop
            with pytest.raises(stop):
                forward(called, at_step(inputs, 0, 8))
            stops[0] = None
            assert torch.equal(walk(called, inputs, handle), cached)
    assert torch.equal(walk(called, inputs, None), untouched["wan"][0])


@pytest.mark.parametrize("stopped_at", [0, 2, 6])
def test_an_interrupted_run_leaves_nothing_behind(stopped_at):
    pipeline = tiny.wan_pipeline()

    def stop(pipe, step, timestep, kwargs):
        if step == stopped_at:
            raise KeyboardInterrupt
        return kwargs

    with rsa.enable_teacache(pipeline, threshold=HUGE) as handle:
        whole = tiny.run_wan(pipeline, steps=8)
        stats = handle.stats()
        with pytest.raises(KeyboardInterrupt):
            tiny.run_wan(pipeline, steps=8, callback_on_step_end=stop)
        assert torch.equal(tiny.run_wan(pipeline, steps=8), whole)
        assert handle.stats() == stats
