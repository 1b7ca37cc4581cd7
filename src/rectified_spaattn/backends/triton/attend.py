"""Stage 6 on a GPU: attention over listed key blocks and isolated keys, rectified and stored where the token was."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...method.inputs import Inputs
from ...method.tail import CAP
from . import ROOMY, Partial, Prepared, arch_of, columns_of, why_not_gluon
from .select import longest_first
from .tile import place_of


class Tiling(NamedTuple):
    """How a kernel is launched: queries a program, keys a step, warps, pipeline stages, most registers a thread, and
    pipeline stages of the loops over keys with a bias.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tail_stages: int = 1


def attend(inputs: Inputs, prepared: Prepared, partial: Partial | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """R * (attention over listed blocks and isolated keys) + C for tiled queries, full attention for isolated ones.

    Where there is a tail, tiled queries attend to listed blocks, isolated keys and the tail's pooled ones instead, and
    where there is a slope, the tail's share of q @ slope is added. With `partial` all but the listed blocks are
    attended to here, and joined to it.

    Returns out [B, S, H, D] in the model's token order, and the log-sum-exp of the logits of every query over the keys
    it attended to, float32 [B, H, rows], in block order.
    """
    batch, heads, rows, _ = prepared.tiled.q.shape
    num_blocks, query_blocks = inputs.blocks.num_blocks, rows // inputs.blocks.block_size
    out = inputs.new_out()
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    if partial is None:
        turns = None
        if inputs.config.rule.choice == "error":  # rows differ in length: the longest start first
            turns = longest_first(prepared.lists.counts)
        _attend_last(inputs, prepared, query_blocks, turns, out, lse)
        return out, lse
    if not partial.isolated:
        # a few programs go over all keys: without `partial` they hold more at once, so are done sooner
        if query_blocks > num_blocks:
            _attend_last(inputs, prepared, query_blocks - num_blocks, None, out, lse)
        query_blocks = num_blocks
    _launch(inputs, prepared, partial, query_blocks, None, out, lse)
    return out, lse


def _attend_last(
    inputs: Inputs,
    prepared: Prepared,
    query_blocks: int,
    turns: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """So many last query blocks, from nothing on. turns: of all of them, as in hopper.attend."""
    arch, blocks = arch_of(out.device), inputs.blocks
    if blocks.num_blocks and why_not_gluon(arch, blocks.block_size, out.shape[-1]) is None:
        from . import hopper

        hopper.attend(inputs, prepared, query_blocks, turns, out, lse)
    else:
        _launch(inputs, prepared, None, query_blocks, turns, out, lse)


def _launch(
    inputs: Inputs,
    prepared: Prepared,
    partial: Partial | None,
    query_blocks: int,
    turns: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """So many query blocks in plain Triton: the first ones with `partial`, else the last."""
    tiled, lists, (r, c, tail, slope) = prepared
    batch, heads, rows, head_dim = tiled.q.shape
    b, num_blocks = inputs.blocks.block_size, inputs.blocks.num_blocks
    k_var = None if tail is None else tail.k_var
    tiling = tiling_of(arch_of(out.device), b, head_dim, resume=partial is not None, own=k_var is not None)
    # a descriptor takes its time, and cannot be of nothing: none of keys that are not read
    of_blocks = (tiled.k, tiled.v) if partial is None and num_blocks else ()
    pool = () if tail is None else (tail.k, tail.v)
    keys = [_described(of, tiling.block_n) for of in (of_blocks, (tiled.k_tail, tiled.v_tail), pool)]
    before = (tiled.q, lse) if partial is None else partial[:2]  # not read without `partial`
    options = {} if tiling.maxnreg is None else {"maxnreg": tiling.maxnreg}
    _attend_kernel[(query_blocks * b // tiling.block_m, batch * heads)](
        rows_of(tiled.q, tiling.block_m), *keys[0], *keys[1], *keys[2],
        None if k_var is None else rows_of(k_var, tiling.block_n),
        *((None, None) if slope is None else _for_slope(tiled.q, slope, tiling)),
        lists.counts, lists.indices, tiled.tail_bias, tiled.tail_end, tail and tail.bias,
        tiled.order, inputs.blocks.places, turns, r, c,
        out, lse, *before, *before[0].stride()[:3], *out.stride()[:3],
        heads, inputs.group, num_blocks, rows, tail.k.shape[2] if tail else 0,
        inputs.scale / math.log(2), CAP / math.log(2),
        BLOCK=b, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, HEAD_DIM=head_dim, COLUMNS=columns_of(head_dim),
        PART=math.gcd(tiling.block_n, head_dim),
        RESUME=partial is not None, LISTED=len(of_blocks) > 0,
        TAIL=tail is not None, OWN=k_var is not None, TAIL_STAGES=tiling.tail_stages,
        TURNS=turns is not None, SLOPE=slope is not None,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **options,
    )  # fmt: skip


def _described(of: tuple[torch.Tensor, ...], count: int) -> tuple[TensorDescriptor | None, ...]:
    """Keys and values, `count` rows at a time; None of none."""
    return tuple(rows_of(x, count) for x in of if x.numel()) or (None, None)


def rows_of(x: torch.Tensor, count: int) -> TensorDescriptor:
    """x: [..., D], contiguous, read `count` rows at a time, with zeros up to a power of two behind them."""
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [count, columns_of(x.shape[-1])])


def _for_slope(q: torch.Tensor, slope: torch.Tensor, tiling: Tiling) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Both factors of q @ slope in parts of so many columns and rows that they fill a head."""
    part = math.gcd(tiling.block_n, q.shape[-1])
    return TensorDescriptor.from_tensor(q.view(-1, q.shape[-1]), [tiling.block_m, part]), rows_of(slope, part)


def tiling_of(arch: str, block: int, head_dim: int, resume: bool, own: bool = False) -> Tiling:
    """arch: "hip", or the compute capability as in "90". own: queries have a half variance of their own, a product more
    in the loop over pooled keys. It takes more registers, its tiles leave room for one stage, and the squares of
    queries lie beside them.
    """
    tiling = _tiling_of(arch, block, head_dim, resume)
    if not own:
        return tiling
    if head_dim > 128 and arch not in ROOMY:
        tiling = tiling._replace(block_m=32 if arch == "hip" else 64, num_warps=4)
    return tiling._replace(maxnreg=tiling.maxnreg and 168, tail_stages=1)


def _tiling_of(arch: str, block: int, head_dim: int, resume: bool) -> Tiling:
    """Shared memory decides: 64 KiB, 99 KiB, or 163 and more."""
    wide = block * columns_of(head_dim) > 8192
    if head_dim > 128:  # an accumulator and tiles of twice the size
        hopper = arch in ("90", "100", "103")
        return Tiling(block, 64 if hopper else 16 if arch == "hip" else 32, 8 if block > 64 else 4, 2 if hopper else 1)
    if arch == "hip":
        return Tiling(block, 32, 4, 1)
    if arch in ("90", "100", "103"):
        # two programs or more an SM: one computes its softmax while the others multiply
        if resume:
            return Tiling(64, 64, 4, 1, maxnreg=128, tail_stages=1 if head_dim > 64 else 2)
        return Tiling(block if head_dim > 64 else 64, 64, 4, 3, tail_stages=2)
    if arch == "80":
        return Tiling(block, 64, 8 if wide else 4, 2)
    return Tiling(block, 32, 8 if wide else 4, 2)


@triton.jit
def own_square(q, scale, dtype):
    """Whose product with the variances of keys is ½σ² in powers of two. scale: in powers of two."""
    wide = q.to(tl.float32) * scale
    return (wide * wide * 0.34657359).to(dtype)


@triton.jit
def _absorb(acc, total, top, score, scale, v):
    """One tile of keys joins a running softmax. score * scale is in powers of two."""
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    against = tl.where(new_top == float("-inf"), 0.0, new_top)
    # [BLOCK_M, BLOCK_N]
    p = tl.exp2(score * scale - against[:, None])
    shrink = tl.exp2(top - against)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_top


@triton.jit
def _absorb_biased(
    acc, total, top, q, k_desc, v_desc, first, bias_ptr, end, limit, scale, square, k_var_desc, first_var, cap,
    OWN: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys with a bias of their own, `end` rows from row `first` on; from `limit` on there is no bias, and no key.

    OWN: every query adds its ½σ², square times the rows of k_var_desc from `first_var` on, up to `cap`.
    """
    for start in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        # [BLOCK_N]
        j = start + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + j, mask=j < limit, other=float("-inf")) * 1.4426950408889634
        k = k_desc.load([first + start, 0])
        if OWN:
            # [BLOCK_M, BLOCK_N]: what is added to a score is there before its product, in the same registers
            half = tl.minimum(tl.dot(square, k_var_desc.load([first_var + start, 0]).T), cap) + bias[None, :]
            score = tl.dot(q, k.T, tl.where(bias[None, :] == float("-inf"), float("-inf"), half) / scale)
            acc, total, top = _absorb(acc, total, top, score, scale, v_desc.load([first + start, 0]))
        else:
            score = tl.dot(q, k.T) * scale + bias[None, :]
            acc, total, top = _absorb(acc, total, top, score, 1.0, v_desc.load([first + start, 0]))
    return acc, total, top


@triton.jit
def _attend_kernel(
    q_desc, k_desc, v_desc, k_tail_desc, v_tail_desc, k_pool_desc, v_pool_desc, k_var_desc, q_part_desc, slope_desc,
    count_ptr, index_ptr, tail_bias_ptr, end_ptr, pool_bias_ptr, order_ptr, places_ptr, turn_ptr, r_ptr, c_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    partial_sb, partial_sh, partial_ss,
    out_sb, out_ss, out_sh,
    heads, group, num_blocks, rows, pool_rows, scale, cap,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    PART: tl.constexpr, RESUME: tl.constexpr, LISTED: tl.constexpr,
    TAIL: tl.constexpr, OWN: tl.constexpr, TAIL_STAGES: tl.constexpr, TURNS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    key_head = head // group
    if TURNS:
        parts: tl.constexpr = BLOCK // BLOCK_M
        n = tl.load(turn_ptr + head * (rows // BLOCK) + tl.program_id(0) // parts)
        first = n * BLOCK + tl.program_id(0) % parts * BLOCK_M
    elif RESUME:
        first = tl.program_id(0) * BLOCK_M
        n = first // BLOCK
    else:
        # blocks of isolated queries attend to every key: they start first
        first = rows - (tl.program_id(0) + 1) * BLOCK_M
        n = first // BLOCK
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, COLUMNS)
    there = d < HEAD_DIM
    own = head.to(tl.int64) * rows + i
    # [BLOCK_M, COLUMNS]
    q = q_desc.load([head * rows + first, 0])
    if RESUME:
        from_partial = partial_ptr + batch * partial_sb + h * partial_sh
        of_row = i.to(tl.int64)[:, None] * partial_ss + d[None, :]
        acc = tl.load(from_partial + of_row, mask=there[None, :], other=0.0).to(tl.float32)
        # [BLOCK_M]
        top = tl.load(partial_lse_ptr + own) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    if LISTED:
        listed = head.to(tl.int64) * (rows // BLOCK) + n
        index_row = index_ptr + listed * num_blocks
        steps: tl.constexpr = BLOCK // BLOCK_N
        count = tl.load(count_ptr + listed) * steps
        for j in tl.range(0, count):
            at = (key_head * num_blocks + tl.load(index_row + j // steps)) * BLOCK + j % steps * BLOCK_N
            # [BLOCK_M, BLOCK_N]
            score = tl.dot(q, k_desc.load([at, 0]).T)
            acc, total, top = _absorb(acc, total, top, score, scale, v_desc.load([at, 0]))

    tail = rows - num_blocks * BLOCK
    if k_tail_desc is not None:
        acc, total, top = _absorb_biased(
            acc, total, top, q, k_tail_desc, v_tail_desc, key_head * tail,
            tail_bias_ptr + batch * tail, tl.load(end_ptr + batch), tail, scale, None, None, 0, cap,
            False, BLOCK_N, TAIL_STAGES,
        )  # fmt: skip
    planned = head.to(tl.int64) * num_blocks + n
    exact, exact_top = total, top
    if TAIL:
        # [BLOCK_M, COLUMNS]
        square = own_square(q, scale, k_var_desc.dtype) if OWN else None
        acc, total, top = _absorb_biased(
            acc, total, top, q, k_pool_desc, v_pool_desc, key_head * pool_rows,
            pool_bias_ptr + planned * num_blocks, tl.where(n < num_blocks, num_blocks, 0), num_blocks,
            scale, square, k_var_desc, key_head * num_blocks, cap, OWN, BLOCK_N, TAIL_STAGES,
        )  # fmt: skip

    result = acc / total[:, None]
    if SLOPE:
        # [BLOCK_M]: what pooled keys have of the softmax
        share = tl.where(n < num_blocks, 1.0 - exact * tl.exp2(exact_top - top) / total, 0.0)
        for start in tl.range(0, HEAD_DIM, PART, num_stages=1):
            # [BLOCK_M, PART]
            asked = (q_part_desc.load([head * rows + first, start]).to(tl.float32) * share[:, None]).to(q.dtype)
            result = tl.dot(asked, slope_desc.load([head * HEAD_DIM + start, 0]), result, input_precision="ieee")
    if not TAIL and n < num_blocks:
        # [COLUMNS]
        c = tl.load(c_ptr + planned * HEAD_DIM + d, mask=there, other=0.0)
        result = result * tl.load(r_ptr + planned) + c[None, :]
    place = place_of(order_ptr, places_ptr, key_head.to(tl.int64), n, i, num_blocks, BLOCK)
    to = out_ptr + batch * out_sb + h * out_sh
    mask = (place[:, None] >= 0) & there[None, :]
    tl.store(to + place[:, None] * out_ss + d[None, :], result.to(q.dtype), mask=mask)
    tl.store(lse_ptr + own, (top + tl.log2(total)) * 0.6931471805599453)
