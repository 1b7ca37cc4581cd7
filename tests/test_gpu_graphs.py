"""CUDA graphs that inductor captures: what is sparse and what dense is chosen anew in every call. `pytest -m gpu`."""

import warnings
from contextlib import contextmanager

import pytest
import torch

import rectified_spaattn as rsa
import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

STEPS, DENSE_STEPS, LAYERS = 12, 4, 2
SETTINGS = {"sparsity": 0.75, "block_size": 16, "dense_steps": DENSE_STEPS, "dense_layers": (), "top_p": 0.0}


def run(pipeline):
    return tiny.run_wan(pipeline, steps=STEPS, guidance_scale=1.0).float()


def compile_blocks(mode):
    def compiled(model):
        # each block would overwrite what the one before gave, in the untouched model, too
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        model.compile_repeated_blocks(fullgraph=True, mode=mode)

    return compiled


HOW = {
    "blocks, reduce-overhead": compile_blocks("reduce-overhead"),
    "blocks, max-autotune": compile_blocks("max-autotune"),
    "blocks": compile_blocks(None),
    "whole model": lambda model: model.compile(fullgraph=True),
    "whole model, reduce-overhead": lambda model: model.compile(fullgraph=True, mode="reduce-overhead"),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_schedule_goes_on_in_compiled_code(how, when):
    pipeline = tiny.wan_pipeline()
    pipeline.transformer = tiny.wan_transformer(num_layers=LAYERS)
    pipeline.to("cuda")
    untouched = run(pipeline)
    with rsa.enable(pipeline, **SETTINGS):
        eager = run(pipeline)
    assert (eager - untouched).abs().max() > 1e-2
    if when == "before":
        HOW[how](pipeline.transformer)
        for _ in range(2):
            torch.testing.assert_close(run(pipeline), untouched, rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings(), rsa.enable(pipeline, **SETTINGS) as handle:
        warnings.filterwarnings("error", message="rectified_spaattn")
        if when == "after":
            HOW[how](pipeline.transformer)
        for _ in range(3):  # recorded, warmed up, replayed
            torch.testing.assert_close(run(pipeline), eager, rtol=1e-3, atol=1e-3)
            stats = handle.stats()
            assert stats.dense_reasons == {"dense_steps": DENSE_STEPS * LAYERS}
            assert stats.sparse_calls == (STEPS - DENSE_STEPS) * LAYERS
            assert stats.steps == stats.forwards == STEPS
    torch.testing.assert_close(run(pipeline), untouched, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_graph_captured_by_hand_is_refused_where_steps_differ():
    model = tiny.wan_transformer(num_layers=LAYERS).cuda()
    inputs = {name: value.cuda() for name, value in tiny.wan_inputs(batch=1).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody tells the step
        handle = rsa.enable(model, **SETTINGS)
    handle.set_step(0, STEPS)
    model(**inputs)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured.*dense_steps=4"), capturing():
        model(**inputs)
    handle.disable()


@contextmanager
def capturing():
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            yield
        finally:
            graph.capture_end()
