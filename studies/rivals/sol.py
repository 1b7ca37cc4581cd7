"""Sol-Attn (arXiv 2607.24027): blocks of 64 along a curve, kept above a threshold, a pooled tail without variance.

For query block i the scores of key blocks are scale * q̄_i·k̄_j; kept is what lies above their mean + β deviations, the
rest joins every query's softmax as one pooled key with log b. The method takes tokens in the model's order ("raster");
community versions run it along a curve. One β a head is set here so that the budget is met.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from rectified_spaattn.layout import TokenLayout
from rectified_spaattn.orders import CURVES

from .contract import Answer, Head, NotPossible, Pairs, Rule
from .groups import Tail, attend, consecutive, within

BLOCK = 64


def sol(head: Head, budget: float, *, curve: Callable[[tuple[int, int, int]], list[int]]) -> Answer:
    blocks = consecutive(order_along(head.call.layout, curve).to(head.q.device), BLOCK)
    pooled = float(len(head.q) * len(blocks.size))
    k_mean = blocks.mean(head.k)
    score = head.scale * blocks.mean(head.q) @ k_mean.T
    standard = (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True)
    cost = blocks.size[:, None] * blocks.size
    kept = within(standard, cost, head.room(budget, pooled))
    tail = Tail(k_mean, blocks.mean(head.v), blocks.size.log())
    rows = torch.arange(len(head.q), device=head.q.device)
    out = attend(head, rows, blocks.label, blocks.label, kept, tail)
    exact = (cost * kept).sum().item() + len(head.q) * len(head.k_alone)
    return Answer(out=out, pairs=Pairs(exact=exact, pooled=pooled))  # the scores are means of the pooled logits


@lru_cache(maxsize=8)
def order_along(layout: TokenLayout, curve: Callable[[tuple[int, int, int]], list[int]]) -> torch.Tensor:
    """int64 [N]: the tokens that can be tiled along a curve through the grid."""
    if layout.grid is None:
        raise NotPossible("layout: got tokens that lie in no grid; allowed: a grid, for a curve to go through.")
    rank = torch.full((layout.sequence,), layout.sequence)
    places = torch.tensor(curve(layout.grid)) + layout.grid_start
    rank[places] = torch.arange(len(places))
    return rank[layout.video_places].argsort()


def morton(grid: tuple[int, int, int]) -> list[int]:
    """Raster indices in the order of their interleaved bits."""
    axes = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    bits = max(grid).bit_length()
    code = sum((axis >> bit & 1) << 3 * bit + 2 - i for bit in range(bits) for i, axis in enumerate(axes))
    return torch.as_tensor(code).flatten().argsort(stable=True).tolist()


RULES: dict[str, Rule] = {
    "sol-gilbert": partial(sol, curve=partial(CURVES["gilbert"], block_size=BLOCK)),
    "sol-morton": partial(sol, curve=morton),
    "sol-raster": partial(sol, curve=partial(CURVES["raster"], block_size=BLOCK)),
}
