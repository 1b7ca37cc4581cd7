"""The two stages of single_query_rule.py for a GPU, checked against it there and timed.

python -m studies.single_query_kernels --shape hunyuan-video      # needs a GPU
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rectified_spaattn import SparseConfig
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.backends.triton import arrange, columns_of, directions
from rectified_spaattn.backends.triton.tile import Tiled, tile
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.lab.bench.timing import Timed, durations, time_columns
from rectified_spaattn.lab.machine import device_of
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.tail import CAP

from . import harness
from .single_query_rule import ROUNDS, STEPS, exchanged, sampled_rows
from .single_query_rule import unsettled as expected


@dataclass(frozen=True, kw_only=True)
class Options:
    shape: str = option("Whose call is timed.", "hunyuan-video", choices=tuple(SHAPES))
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


def unsettled(inputs: Inputs, tiled: Tiled, residual: torch.Tensor) -> None:
    """Multiplies residual [B, H, nb, nb] by what single_query_rule.unsettled gives. tiled: for a rule with a tail."""
    batch, heads, nb, _ = residual.shape
    rows = sampled_rows(inputs.blocks.block_size)
    columns = columns_of(inputs.q.shape[3])
    assert tiled.k_pool is not None
    _unsettled_kernel[(triton.cdiv(nb * len(rows), 64), batch * heads)](
        tiled.q, tiled.k_pool, tiled.pooled.k_var, tiled.k_tail, tiled.tail_bias, residual,
        heads, inputs.group, nb, tiled.q.shape[2], tiled.k_pool.shape[2], tiled.k_tail.shape[2],
        inputs.scale / math.log(2), math.log2(inputs.blocks.block_size), CAP / math.log(2),
        STEP=rows.step, SAMPLED=len(rows), HEAD_DIM=inputs.q.shape[3], COLUMNS=columns,
        BLOCK_M=64, BLOCK_N=64 if columns <= 128 else 32, num_warps=4, num_stages=2,
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


@triton.jit
def own_square(q, scale, dtype):
    """Whose product with the variances of keys is ½σ² in powers of two. scale: in powers of two."""
    wide = q.to(tl.float32) * scale
    return (wide * wide * 0.34657359).to(dtype)


@triton.jit
def _scores(
    q, square, k_ptr, k_var_ptr, m, num_blocks, scale, log_b, cap, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr
):
    """Logits over some pooled keys, and the half variances in them, both in powers of two: [BLOCK_M, BLOCK_N]."""
    d = tl.arange(0, COLUMNS)
    at, inside = m[:, None] * HEAD_DIM + d[None, :], (m[:, None] < num_blocks) & (d[None, :] < HEAD_DIM)
    k = tl.load(k_ptr + at, mask=inside, other=0.0)
    half = tl.dot(square, tl.load(k_var_ptr + at, mask=inside, other=0.0).T)
    score = tl.dot(q, k.T) * scale + log_b + tl.minimum(half, cap)
    return tl.where(m[None, :] < num_blocks, score, float("-inf")), half


@triton.jit
def _joined(top, total, score):
    """A running log-sum-exp with one more tile, in powers of two."""
    new_top = tl.maximum(top, tl.max(score, 1))
    against = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp2(top - against) + tl.sum(tl.exp2(score - against[:, None]), 1)


@triton.jit
def _unsettled_kernel(
    q_ptr, k_ptr, k_var_ptr, tail_ptr, tail_bias_ptr, residual_ptr,
    heads, group, num_blocks, rows, pool_rows, tail, scale, log_b, cap,
    STEP: tl.constexpr, SAMPLED: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some query blocks of one head: BLOCK_M sampled queries against all keys, twice."""
    EACH: tl.constexpr = BLOCK_M // SAMPLED
    head = tl.program_id(1).to(tl.int64)
    key_head, batch = head // group, head // heads
    n = tl.program_id(0) * EACH
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, COLUMNS)
    row = head * rows + (n * SAMPLED + i) * STEP + STEP // 2
    inside = (n + i // SAMPLED < num_blocks)[:, None] & (d[None, :] < HEAD_DIM)
    # [BLOCK_M, COLUMNS]
    q = tl.load(q_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    square = own_square(q, scale, k_var_ptr.dtype.element_ty)
    k_ptr += key_head * pool_rows * HEAD_DIM
    k_var_ptr += key_head * num_blocks * HEAD_DIM
    # [BLOCK_M]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, tail, BLOCK_N):
        # [BLOCK_N]
        t = start + tl.arange(0, BLOCK_N)
        at = (key_head * tail + t)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(tail_ptr + at, mask=(t[:, None] < tail) & (d[None, :] < HEAD_DIM), other=0.0)
        bias = tl.load(tail_bias_ptr + batch * tail + t, mask=t < tail, other=float("-inf"))
        top, total = _joined(top, total, tl.dot(q, k.T) * scale + bias[None, :])
    for start in tl.range(0, num_blocks, BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        score, _ = _scores(q, square, k_ptr, k_var_ptr, m, num_blocks, scale, log_b, cap, HEAD_DIM, COLUMNS)
        top, total = _joined(top, total, score)
    lse = top + tl.log2(total)
    n += tl.arange(0, EACH)
    for start in tl.range(0, num_blocks, BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        score, half = _scores(q, square, k_ptr, k_var_ptr, m, num_blocks, scale, log_b, cap, HEAD_DIM, COLUMNS)
        # [BLOCK_M, BLOCK_N]
        share = tl.exp2(score - lse[:, None])
        # [EACH, BLOCK_N]: Σ p² σ², and half is ½σ² in powers of two
        square_sum = tl.sum(tl.reshape(share * share * half, (EACH, SAMPLED, BLOCK_N)), 1)
        to = residual_ptr + (head * num_blocks + n[:, None]) * num_blocks + m[None, :]
        there = (n[:, None] < num_blocks) & (m[None, :] < num_blocks)
        moved = tl.load(to, mask=there, other=0.0)
        tl.store(to, moved * tl.sqrt(square_sum * (1.38629436 / SAMPLED)), mask=there)


def in_parts(inputs: Inputs, tiled: Tiled) -> torch.Tensor:
    """What `unsettled` of the rule gives for the tiled call, in float32."""
    nb, b = inputs.blocks.num_blocks, inputs.blocks.block_size
    q, k, v = (x[:, :, : nb * b].float().unflatten(2, (nb, b)) for x in (tiled.q, tiled.k, tiled.v))
    alone = inputs.k[:, inputs.blocks.isolated].float().transpose(1, 2)
    return expected(q, pool(q, k, v, inputs.config.rule), alone, inputs.valid, inputs.scale)


def kernels(options: Options) -> None:
    """Milliseconds of both, checked first on a call of 16 blocks."""
    device = device_of(options.device)
    config = SparseConfig(rectify="row+slope", order="content")
    check(case_inputs(Case(SHAPES["tiny"], config.replace(block_size=64), torch.bfloat16, device)))
    inputs = case_inputs(Case(SHAPES[options.shape], config, torch.bfloat16, device))
    blocks, tiled, (features, order) = inputs.blocks, tile(inputs), sorted_tokens(inputs)
    residual = torch.ones(*tiled.q.shape[:2], blocks.num_blocks, blocks.num_blocks, device=device)
    calls = {
        "exchanges": Timed(lambda _: exchange(features, order, blocks.block_size), options.repeats),
        "sampled queries": Timed(lambda _: unsettled(inputs, tiled, residual), options.repeats),
    }
    for name, seconds in durations(calls, 1, device, lambda done, total: None).items():
        of = time_columns("ms", [1000 * each for each in seconds])
        print(f"{options.shape}, {name}: {of['ms']:.2f} ms ({of['ms_q1']:.2f} to {of['ms_q3']:.2f})")


def case_inputs(case: Case) -> Inputs:
    """A call of the triton backend on normal numbers, sorted by content."""
    q, k, v = case.inputs(0)[0]
    valid = torch.ones(1, case.shape.text, dtype=torch.bool, device=q.device)
    inputs = Inputs(q, k, v, case.blocks(), case.config, valid, q.shape[-1] ** -0.5)
    return inputs._replace(token_order=BACKENDS["triton"].sort(inputs))


def sorted_tokens(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Where sorting sees the tokens, [Z, n, 8], and the order that the tree gives them, int32 [Z, n]."""
    blocks = inputs.blocks
    axes = directions.of_sorting(directions.moments(inputs.q, inputs.k, blocks.tiled, inputs.scale), inputs.q.dtype)
    features = arrange.project(inputs.q, inputs.k, blocks.tiled, axes)
    places = torch.arange(blocks.tiled.numel(), device=inputs.q.device)
    return features, arrange.k_d_order(features, places, blocks.block_size)


def check(inputs: Inputs) -> None:
    """Raises AssertionError where a kernel is not what the rule says, but for rounding."""
    size, tiled, (features, order) = inputs.blocks.block_size, tile(inputs), sorted_tokens(inputs)
    want = exchanged(features, order.long(), size).unflatten(1, (-1, size))
    exchange(features, order, size)
    same = order.long().unflatten(1, (-1, size)).sort().values == want.sort().values
    assert same.float().mean() > 0.9, same.float().mean()  # rounding moves some
    want = in_parts(inputs, tiled)
    got = torch.ones_like(want)
    unsettled(inputs, tiled, got)
    torch.testing.assert_close(got, want, rtol=0.03, atol=1e-3 * want.max().item())


if __name__ == "__main__":
    harness.main(Options, kernels)
