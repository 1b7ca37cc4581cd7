"""TeaCache under torch.compile, of blocks and of whole models."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rectified_spaattn as rsa
from teacache_cases import HUGE, MODELS, first_steps, walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["hunyuan", "wan", "flux"])
@pytest.mark.parametrize("compile_first", [True, False])
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
