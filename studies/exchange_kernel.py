"""The exchanges of single_queries.py for a GPU, checked against them there and timed.

python -m studies.exchange_kernel --shape hunyuan-video      # needs a GPU
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rectified_spaattn import SparseConfig
from rectified_spaattn.backends.triton import arrange, directions
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.lab.bench.timing import Timed, durations, time_columns
from rectified_spaattn.lab.machine import device_of
from rectified_spaattn.lab.option import option

from . import harness
from .single_queries import ROUNDS, STEPS, exchanged


@dataclass(frozen=True, kw_only=True)
class Options:
    shape: str = option("Whose call is sorted.", "hunyuan-video", choices=tuple(SHAPES))
    repeats: int = option("Rounds of the timing.", 10)
    device: str = option("auto or cuda.", "auto")


def exchange(features: torch.Tensor, order: torch.Tensor, block_size: int) -> None:
    """As `exchanged`, in place. features: [Z, n, r]; order: int32 [Z, n], both contiguous."""
    trees, count, rank = features.shape
    blocks = count // block_size
    for shift in list(range((blocks - 1).bit_length())) * ROUNDS:
        _exchange_kernel[(blocks, trees)](
            features, order, count, blocks, 1 << shift,
            BLOCK=block_size, RANK=rank, STEPS=STEPS, num_warps=1,
        )  # fmt: skip


@triton.jit
def _exchange_kernel(
    features_ptr, order_ptr, count, blocks, apart,
    BLOCK: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Two blocks of one tree exchange tokens."""
    one = tl.program_id(0)
    if (one & apart) != 0 or one + apart >= blocks:
        return
    z = tl.program_id(1).to(tl.int64)
    # [2 * BLOCK]
    i = tl.arange(0, 2 * BLOCK)
    at = order_ptr + z * count + tl.where(i < BLOCK, one * BLOCK + i, (one + apart - 1) * BLOCK + i)
    token = tl.load(at)
    # [2 * BLOCK, RANK]
    from_ptr = features_ptr + z * count * RANK
    point = tl.load(from_ptr + token[:, None] * RANK + tl.arange(0, RANK)[None, :]).to(tl.float32)
    left = i < BLOCK
    for _ in tl.static_range(STEPS):
        # [RANK]: between the means
        total = tl.sum(point, 0)
        line = total - 2 * tl.sum(tl.where(left[:, None], point, 0.0), 0)
        # [2 * BLOCK]: floats of 0 and more are ordered as their bits are
        along = tl.sum(point * line[None, :], 1)
        bits = (along - tl.min(along, 0)).to(tl.int32, bitcast=True) >> 16
        edge = 0  # the BLOCK-th smallest: the largest number that fewer than BLOCK are below, from the highest bit down
        for bit in tl.static_range(15):
            step = 1 << (14 - bit)
            edge += tl.where(tl.sum((bits < edge + step).to(tl.int32), 0) < BLOCK, step, 0)
        wanted = BLOCK - tl.sum((bits < edge).to(tl.int32), 0)
        equal = (bits == edge).to(tl.int32)
        left = (bits < edge) | ((equal != 0) & (tl.cumsum(equal, 0) <= wanted))
    rank = tl.cumsum(left.to(tl.int32), 0) - 1
    place = tl.where(left, rank, BLOCK + i - rank - 1)
    to = order_ptr + z * count + tl.where(place < BLOCK, one * BLOCK + place, (one + apart - 1) * BLOCK + place)
    tl.debug_barrier()
    tl.store(to, token)


def sorted_tokens(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Of normal numbers: where sorting sees the tokens, [Z, n, 8], and the order that the tree gives, int32 [Z, n]."""
    (q, k, _), tiled = case.inputs(0)[0], case.blocks().tiled.to(case.device)
    axes = directions.of_sorting(directions.moments(q, k, tiled, q.shape[-1] ** -0.5), q.dtype)
    places = torch.arange(len(tiled), device=q.device)
    features = arrange.project(q, k, tiled, axes)
    return features, arrange.k_d_order(features, places, case.config.block_size)


def check(case: Case) -> None:
    """Raises AssertionError where the kernel does not exchange as `exchanged` does, but for rounding."""
    size, (features, order) = case.config.block_size, sorted_tokens(case)
    want = exchanged(features, order.long(), size).unflatten(1, (-1, size))
    exchange(features, order, size)
    same = order.long().unflatten(1, (-1, size)).sort().values == want.sort().values
    assert same.float().mean() > 0.9, same.float().mean()  # rounding moves some


def exchange_kernel(options: Options) -> None:
    """Milliseconds of the exchanges of one call, checked first on one of 16 blocks."""
    device, config = device_of(options.device), SparseConfig()
    check(Case(SHAPES["tiny"], config.replace(block_size=64), torch.bfloat16, device))
    features, order = sorted_tokens(Case(SHAPES[options.shape], config, torch.bfloat16, device))
    calls = {"exchanges": Timed(lambda _: exchange(features, order, config.block_size), options.repeats)}
    [seconds] = durations(calls, 1, device, lambda done, total: None).values()
    of = time_columns("ms", [1000 * each for each in seconds])
    print(f"{options.shape}, exchanges: {of['ms']:.2f} ms ({of['ms_q1']:.2f} to {of['ms_q3']:.2f})")


if __name__ == "__main__":
    harness.main(Options, exchange_kernel)
