"""Ways to sort the tokens of a head before they are cut into blocks, on attention inputs of the demo model.

    python -m studies.content_order --pairs 4 --block-size 64 --block-size 128 [--only "in space"]

Tokens are moved to the order under test, the operator runs on them with blocks in space, and its output is moved back;
"content" is what order="content" does. "order of N steps earlier" sorts by the same layer's q and k of an earlier step,
or of the first where there are fewer than N before. A way that cannot make as many blocks as there are is left out.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall, arrange
from rectified_spaattn.lab.calls.error import full_attention, kept_mass
from rectified_spaattn.lab.option import option
from rectified_spaattn.method import arrange as library
from rectified_spaattn.method.arrange import content_order, k_d_order, moments, sample_of
from rectified_spaattn.orders import Blocks

from . import harness
from .harness import EXACT
from .selectors import true_masses

IN_USE = "content"
Orders = tuple[torch.Tensor, torch.Tensor]  # of queries and of keys, each int64 [B, H, nb * b], places in the sequence
Space = Callable[[AttentionCall, Blocks], torch.Tensor]  # the tiled tokens in it: [Z, n, 2D]
Cut = Callable[[torch.Tensor, int], torch.Tensor]  # features [Z, n, r] and block size -> order, int64 [Z, n]


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair.

    captured  full-attention mass on the critical blocks and the isolated tokens
    error     |out - full| / |full| over the video tokens
    """

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "block_size", "way", "rectify")
    sparsity: float
    block_size: int
    way: str
    rectify: str
    captured: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """sort(call, blocks) gives the orders; back: how many steps earlier the call is; blocks: how many it can make."""

    sort: Callable[[AttentionCall, Blocks], Orders]
    back: int = 0
    blocks: Callable[[int], bool] = lambda count: True


def in_space(call: AttentionCall, blocks: Blocks) -> Orders:
    order = blocks.tiled.expand(call.q.shape[0], call.q.shape[2], -1)
    return order, order


def by_content(call: AttentionCall, blocks: Blocks, **constants: int) -> Orders:
    """The order in use; constants: those of method/arrange.py to replace."""
    with patch.dict(vars(library), constants):
        order = content_order(call.q, call.k, blocks.tiled, block_size=blocks.block_size, scale=_scale(call))
    return order, order


def by_directions(call: AttentionCall, blocks: Blocks, *, cut: Cut, rank: int, space: Space) -> Orders:
    """One order for queries and keys."""
    order = _placed(cut(principal(space(call, blocks), rank), blocks.block_size), call, blocks)
    return order, order


def apart(call: AttentionCall, blocks: Blocks) -> Orders:
    """Queries by the features of queries alone, keys by those of keys alone."""
    q, k = weighted(call, blocks).chunk(2, dim=2)
    order_q, order_k = (_placed(k_d(principal(half, 8), blocks.block_size), call, blocks) for half in (q, k))
    return order_q, order_k


def keys_only(call: AttentionCall, blocks: Blocks) -> Orders:
    return in_space(call, blocks)[0], apart(call, blocks)[1]


def weighted(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """[q M_k½, k M_q½] of every tiled token: the space in which content_order looks for directions."""
    weigh = moments(sample_of(call.q, blocks.tiled), sample_of(call.k, blocks.tiled), _scale(call)).weigh
    values, vectors = torch.linalg.eigh(weigh.double())
    half = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.transpose(1, 2)
    return _tokens(call, blocks) @ half.float()


def unweighted(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """[q, k], each over its standard deviation."""
    halves = _tokens(call, blocks).chunk(2, dim=2)
    return torch.cat([half / half.var(1).sum(1).sqrt()[:, None, None] for half in halves], dim=2)


def principal(x: torch.Tensor, rank: int) -> torch.Tensor:
    """x [Z, n, D] along its principal directions, the widest first: [Z, n, rank]."""
    apart = x - x.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh((apart.transpose(1, 2) @ apart).double())
    return apart @ vectors[..., -rank:].flip(-1).float()


def k_d(features: torch.Tensor, block_size: int) -> torch.Tensor:
    return k_d_order(features.to(torch.bfloat16), block_size)


def across_widest(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every node in two halves along its own principal direction; as many blocks as a power of two."""
    order = torch.arange(features.shape[1]).expand(features.shape[:2])
    size = features.shape[1]
    while size > block_size:
        nodes = features.gather(1, order[..., None].expand_as(features)).unflatten(1, (-1, size)).flatten(0, 1)
        order = order.reshape(-1, size).gather(1, principal(nodes, 1)[..., 0].argsort(1)).view(order.shape)
        size //= 2
    return order


def slices(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """In 4 by the first feature, each of them in 4 by the second, and those by the third."""
    order = torch.arange(features.shape[1]).expand(features.shape[:2])
    for level in range(3):
        value = features[..., level].gather(1, order).unflatten(1, (4**level, -1))
        order = order.reshape(value.shape).gather(2, value.argsort(2)).flatten(1)
    return order


def hilbert(features: torch.Tensor, block_size: int, bits: int = 8) -> torch.Tensor:
    """Along the Hilbert curve through the ranks of the features: every axis in 2^bits parts of as many tokens."""
    ranks = features.argsort(1).argsort(1) * 2**bits // features.shape[1]
    return hilbert_index(ranks, bits).argsort(1)


def hilbert_index(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """Place on the curve of cells int64 [..., r], by Skilling's transform (AIP Conf. Proc. 707, 381, 2004): [...]."""
    x = list(cells.unbind(-1))
    for bit in reversed(range(1, bits)):
        low = 2**bit - 1
        for i in range(len(x)):
            high = (x[i] >> bit & 1).bool()
            swap = torch.where(high, 0, (x[0] ^ x[i]) & low)
            x[0], x[i] = x[0] ^ torch.where(high, low, swap), (x[i] if i else x[0] ^ torch.where(high, low, 0)) ^ swap
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((x[-1] >> bit & 1).bool(), turn ^ (2**bit - 1), turn)
    place = torch.zeros_like(turn)
    for bit in reversed(range(bits)):
        for axis in x:
            place = place * 2 + ((axis ^ turn) >> bit & 1)
    return place


def sort_by(rank: int, cut: Cut, space: Space = weighted) -> Callable[[AttentionCall, Blocks], Orders]:
    return partial(by_directions, cut=cut, rank=rank, space=space)


WAYS: dict[str, Way] = {
    "in space": Way(sort=in_space),
    IN_USE: Way(sort=by_content),
    "queries and keys each in their own order": Way(sort=apart),
    "keys only": Way(sort=keys_only),
    "without weights": Way(sort=sort_by(8, k_d, unweighted)),
    "exact directions": Way(sort=sort_by(8, k_d)),
    "cut across the widest direction": Way(sort=sort_by(8, across_widest), blocks=lambda n: n & (n - 1) == 0),
    "4 x 4 x 4 slices": Way(sort=sort_by(3, slices), blocks=lambda n: n == 64),
    "Hilbert curve through 3 directions": Way(sort=sort_by(3, hilbert)),
    "order of 2 steps earlier": Way(sort=by_content, back=2),
    "order of 4 steps earlier": Way(sort=by_content, back=4),
    "content, 4 directions": Way(sort=partial(by_content, DIRECTIONS=4)),
    "content, 16 directions": Way(sort=partial(by_content, DIRECTIONS=16)),
    "content, sample of 512": Way(sort=partial(by_content, SAMPLE=512)),
    "content, 40 rounds": Way(sort=partial(by_content, ROUNDS=40)),
}


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.9,))
    block_size: tuple[int, ...] = option("Tokens a block.", (64,))
    only: tuple[str, ...] = option(f"Ways to sort; {IN_USE!r} comes along.", (), choices=tuple(WAYS), unset="all")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.only) - set(WAYS))
        if unknown:
            raise ValueError(f"only: got {unknown}; allowed: {', '.join(WAYS)}.")


def judge(
    call: AttentionCall, full: torch.Tensor, orders: Orders, configs: Sequence[SparseConfig]
) -> list[dict[str, float]]:
    """What Row measures, under every config. full: full_attention(call); configs: of one block size, in space."""
    blocks, (order_q, order_k) = call.blocks(configs[0]), orders
    q, k, v = (arrange(x, blocks.tiled, o) for x, o in ((call.q, order_q), (call.k, order_k), (call.v, order_k)))
    moved = replace(call, q=q, k=k, v=v)
    true = true_masses(moved, blocks)
    results = []
    for config in configs:
        out, stats = moved.sparse(config)
        wrong = (put_back(out, blocks.tiled, order_q) - full)[:, call.video]
        error = (wrong.norm() / full[:, call.video].norm()).item()
        results.append({"captured": kept_mass(stats.block_mask[0], true), "error": error})
    return results


def judge_all(calls: Sequence[AttentionCall], names: Sequence[str], options: Options) -> Iterator[dict[str, Any]]:
    """Every way on the calls of one run that the options ask for; of other steps only q and k serve, to sort by."""
    by_place = {(call.step, call.layer): call for call in calls}
    for call, size in itertools.product(calls, options.block_size):
        if call.step not in options.step:
            continue
        configs = [EXACT.replace(block_size=size, rectify="row", sparsity=each) for each in options.sparsity]
        blocks, full = call.blocks(configs[0]), full_attention(call)
        for name in names:
            way = WAYS[name]
            if not way.blocks(blocks.num_blocks):
                continue
            orders = way.sort(by_place[max(0, call.step - way.back), call.layer], blocks)
            for config, values in zip(configs, judge(call, full, orders, configs), strict=True):
                setting = {"sparsity": config.sparsity, "block_size": size, "way": name, "rectify": config.rectify}
                yield setting | values


def put_back(x: torch.Tensor, tiled: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What `arrange` moved, back at its places."""
    index = order.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.scatter(1, index, x[:, tiled])


def _tokens(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """[q, k] of every tiled token, centred: [Z, n, 2D]."""
    both = torch.cat([call.q, call.k], dim=3)[:, blocks.tiled].transpose(1, 2).flatten(0, 1)
    return both - both.mean(1, keepdim=True)


def _placed(order: torch.Tensor, call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    return blocks.tiled[order].view(call.q.shape[0], call.q.shape[2], -1)


def _scale(call: AttentionCall) -> float:
    return call.q.shape[-1] ** -0.5


def content_order_study(options: Options) -> None:
    """Ways to sort the tokens of a head before they are cut into blocks."""
    names = [name for name in WAYS if not options.only or name in options.only or name == IN_USE]
    steps = {max(0, step - WAYS[name].back) for step in options.step for name in names}

    def show(rows):
        print(harness.table(rows, ("captured", "error"), {"way": IN_USE}, ("error",)))
        for size in dict.fromkeys(row.block_size for row in rows):
            out = [way for way in WAYS if way not in {row.way for row in rows if row.block_size == size}]
            print(f"\nNot measured at block size {size}: {', '.join(out) or 'nothing'}")

    measure = harness.on_calls(Row, options, lambda calls: judge_all(calls, names, options), sorted(steps))
    harness.run("content_order", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, content_order_study)
