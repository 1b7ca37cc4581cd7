"""Stage 3 on a GPU where single queries tell which blocks leave the largest error."""

import math

import torch
import triton
import triton.language as tl

from ...method.inputs import Inputs
from ...method.residual import sampled_rows
from ...method.tail import CAP
from . import columns_of
from .attend import own_square, rows_of
from .tile import Tiled


def told_by_queries(inputs: Inputs, tiled: Tiled, residual: torch.Tensor) -> None:
    """Multiplies residual [B, H, nb, nb] by what method.residual.told_by_queries gives."""
    batch, heads, nb, _ = residual.shape
    rows = sampled_rows(inputs.blocks.block_size)
    columns = columns_of(inputs.q.shape[3])
    block_n = 64 if columns <= 128 else 32
    if tiled.k_pool is None or tiled.pooled.k_var is None:
        raise ValueError("told_by_queries: got tokens tiled without a tail; tile with the same rule.")
    _told_kernel[(triton.cdiv(nb * len(rows), 64), batch * heads)](
        tiled.q, *(rows_of(x, block_n) for x in (tiled.k_pool, tiled.pooled.k_var)),
        tiled.k_tail, tiled.tail_bias, residual,
        heads, inputs.group, nb, tiled.q.shape[2], tiled.k_pool.shape[2], tiled.k_tail.shape[2],
        inputs.scale / math.log(2), math.log2(inputs.blocks.block_size), CAP / math.log(2),
        STEP=rows.step, SAMPLED=len(rows), HEAD_DIM=inputs.q.shape[3], COLUMNS=columns,
        BLOCK_M=64, BLOCK_N=block_n, num_warps=4, num_stages=1,
    )  # fmt: skip


@triton.jit
def _scores(q, square, k_desc, k_var_desc, first, first_var, m, num_blocks, scale, log_b, cap):
    """Logits over some pooled keys, and the half variances in them, both in powers of two: [BLOCK_M, BLOCK_N]."""
    half = tl.dot(square, k_var_desc.load([first_var, 0]).T)
    score = tl.dot(q, k_desc.load([first, 0]).T) * scale + log_b + tl.minimum(half, cap)
    return tl.where(m[None, :] < num_blocks, score, float("-inf")), half


@triton.jit
def _joined(top, total, score):
    """A running log-sum-exp with one more tile, in powers of two."""
    new_top = tl.maximum(top, tl.max(score, 1))
    against = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp2(top - against) + tl.sum(tl.exp2(score - against[:, None]), 1)


@triton.jit
def _told_kernel(
    q_ptr, k_desc, k_var_desc, tail_ptr, tail_bias_ptr, residual_ptr,
    heads, group, num_blocks, rows, pool_rows, tail, scale, log_b, cap,
    STEP: tl.constexpr, SAMPLED: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some query blocks of one head: BLOCK_M sampled queries against all keys, and again against pooled ones."""
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
    square = own_square(q, scale, k_var_desc.dtype)
    first, first_var = (key_head * pool_rows).to(tl.int32), (key_head * num_blocks).to(tl.int32)
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
        score, _ = _scores(
            q, square, k_desc, k_var_desc, first + start, first_var + start, m, num_blocks, scale, log_b, cap
        )
        top, total = _joined(top, total, score)
    lse = top + tl.log2(total)
    n += tl.arange(0, EACH)
    for start in tl.range(0, num_blocks, BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        score, half = _scores(
            q, square, k_desc, k_var_desc, first + start, first_var + start, m, num_blocks, scale, log_b, cap
        )
        # [BLOCK_M, BLOCK_N]
        share = tl.exp2(score - lse[:, None])
        # [EACH, BLOCK_N]: Σ p² σ², and half is ½σ² in powers of two
        square_sum = tl.sum(tl.reshape(share * share * half, (EACH, SAMPLED, BLOCK_N)), 1)
        to = residual_ptr + (head * num_blocks + n[:, None]) * num_blocks + m[None, :]
        there = (n[:, None] < num_blocks) & (m[None, :] < num_blocks)
        moved = tl.load(to, mask=there, other=0.0)
        tl.store(to, moved * tl.sqrt(square_sum * (1.38629436 / SAMPLED)), mask=there)
