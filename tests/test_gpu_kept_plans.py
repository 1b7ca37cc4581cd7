"""Kept plans on a GPU: places of 16 bits, bits of lists, memory of the device, CUDA graphs. `pytest -m gpu`."""

import pytest
import torch

from cases import video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.kept_plans import CAPTURED, KeptPlans, Moment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

CONFIG = SparseConfig(block_size=64, sparsity=0.7, top_p=0.0, replan=3)


def at(step: int) -> Moment:
    return Moment(layer=0, branch=0, step=step, total=9)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("grid", [(4, 16, 16), (17, 64, 64)])  # 1,024 and 69,632 tokens: 16 and 32 bits
def test_what_was_kept_is_taken_as_it_was(grid: tuple[int, int, int], lists: bool) -> None:
    layout, config, plans = TokenLayout.build(grid, 7), CONFIG.replace(kept_lists=lists), KeptPlans()
    now, later = (
        tuple(x.cuda() for x in video_like(seed, 1, layout.sequence, 2, 64, torch.bfloat16)) for seed in (0, 1)
    )
    _, first = plans.attention(*now, layout, config, at(0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    nbytes = plans.nbytes
    assert nbytes >= 2 * (layout.video // 64) * 64 * (2 if layout.sequence <= 1 << 16 else 4)
    out, stats = plans.attention(*later, layout, config, at(2))
    choices = {"block_mask": first.block_mask} if lists else {}
    want = rectified_attention(*later, layout, config, token_order=first.token_order, **choices)
    assert torch.equal(out, want)
    assert torch.equal(stats.token_order, first.token_order)
    del out, stats, want
    assert plans.nbytes == 0
    assert before - torch.cuda.memory_allocated() >= nbytes  # it was the last step that may take it


def test_a_captured_call_plans_for_itself() -> None:
    layout, plans = TokenLayout.build((4, 16, 16), 7), KeptPlans()
    qkv = tuple(x.cuda() for x in video_like(0, 1, layout.sequence, 2, 64, torch.bfloat16))
    for step in (0, 1):  # compiled
        want, _ = plans.attention(*qkv, layout, CONFIG, at(step), backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = plans.attention(*qkv, layout, CONFIG, at(2), backend="triton")
    graph.replay()
    assert torch.equal(out, want)
    assert (plans.planned, plans.taken, plans.unkept) == (1, 1, {CAPTURED: 1})
