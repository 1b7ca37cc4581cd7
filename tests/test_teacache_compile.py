"""TeaCache under torch.compile, of blocks and of whole models."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn as rsa
import tiny
from teacache_cases import HUGE, MODELS, first_steps, flux_inputs, flux_transformer, walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "compile_first"),
    [
        ("wan", True),
        ("flux", False),
        pytest.param("wan", False, marks=pytest.mark.slow),
        pytest.param("hunyuan", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_stay_one_graph(name, compile_first):
    """Skipping goes on outside of the compiled blocks: no graph break, and no compilation a step or a layer."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        eager = walk(model, inputs, handle)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    if compile_first:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    handle = rsa.enable_teacache(model, threshold=HUGE)
    if not compile_first:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
    compiled = walk(model, inputs, handle)
    graphs = counter.frame_count
    assert 0 < graphs <= (1 if name == "wan" else 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = walk(model, inputs, handle)
    assert counter.frame_count == graphs
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled, again)
    assert handle.stats().skipped == 7 - first_steps(name)


WHOLE = [("wan", "around"), ("wan", "in place, later"), ("hunyuan-i2v", "around")]
SLOW = [("wan", "around, later"), ("wan", "in place"), ("flux", "around")]
WHOLE_AND_SLOW = [*WHOLE, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]


@pytest.mark.parametrize(("name", "how"), WHOLE_AND_SLOW)
def test_a_whole_model_in_one_graph(fresh_compiler, name, how):
    """fullgraph=True, by torch.compile(model) or model.compile(), before or after: two graphs, one without blocks."""
    make, inputs = MODELS[name]
    model, inputs = make(), inputs()
    untouched = walk(model, inputs, None)
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        eager = walk(model, inputs, handle)
    counter = CompileCounterWithBackend("eager")

    def compiled():
        if how.startswith("in place"):
            model.compile(fullgraph=True, backend=counter)
            return model
        return torch.compile(model, fullgraph=True, backend=counter)

    called = model if how.endswith("later") else compiled()
    with rsa.enable_teacache(called, threshold=HUGE) as handle:
        called = compiled() if how.endswith("later") else called
        first = walk(called, inputs, handle)
        assert counter.frame_count == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(walk(called, inputs, handle), first)
        assert handle.stats().skipped == 7 - first_steps(name)
    torch.testing.assert_close(first, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(walk(called, inputs, None), untouched, rtol=1e-5, atol=1e-6)


def test_a_whole_model_with_sparse_attention_in_one_graph(fresh_compiler):
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with rsa.enable(model, **tiny.SPARSE), rsa.enable_teacache(model, threshold=HUGE) as handle:
        eager = walk(model, inputs, handle)
        called = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(walk(called, inputs, handle), eager, rtol=1e-5, atol=1e-6)


def test_a_step_tried_without_its_blocks_and_made_with_them(fresh_compiler):
    """A threshold that skips some: both graphs in one call."""
    model, inputs = flux_transformer(), flux_inputs()
    with rsa.enable_teacache(model, threshold=0.5) as handle:
        eager = walk(model, inputs, handle, pace=0.03)
        stats = handle.stats()
        called = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(walk(called, inputs, handle, pace=0.03), eager)
        assert handle.stats() == stats
        assert 0 < stats.skipped < 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_cuda_graphs(fresh_compiler, mode, whole):
    """What TeaCache keeps from step to step is no memory of a CUDA graph, which the next pass writes over."""
    make, inputs = MODELS["wan"]
    model, inputs = make().cuda(), {name: value.cuda() for name, value in inputs().items()}
    with rsa.enable_teacache(model, threshold=HUGE) as handle:
        eager = walk(model, inputs, handle)
        called = model
        if whole:
            called = torch.compile(model, mode=mode, fullgraph=True)
        else:
            # each block would overwrite what the one before gave, in the untouched model, too
            model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
            model.compile_repeated_blocks(mode=mode, fullgraph=True)
        for _ in range(4):  # recorded, and played
            torch.testing.assert_close(walk(called, inputs, handle), eager, rtol=1e-3, atol=1e-3)
            assert handle.stats().skipped == 2
