"""The listed blocks in 8 bits: keys and values less their head's mean, quantised block by block; then attention.

Softmax does not see what all keys share, and what all values share comes back whole, so that neither mean costs
anything. Isolated and pooled keys stay in 16 bits: they are joined afterwards, as to FlashAttention-4's blocks.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...method.arrange import sample_of
from ...method.inputs import Inputs
from . import ROOMY, Partial, Prepared, arch_of, columns_of, interpreted, why_not_gluon
from .attend import rows_of
from .select import longest_first
from .tile import Tiled

_ROOM = 8  # weights of fp8 values are in [0, 2^8]: e4m3 holds down to 2^-9


class Quantised(NamedTuple):
    """k, v of the tiled blocks in 8 bits: k ≈ k8 * k_scale + k_shift, v ≈ v8 * v_scale + v_shift.

    k                 int8 or float8_e4m3fn [B, Hk, nb*b, D]
    v                 float8_e4m3fn [B, Hk, nb, D, b], every block transposed; None where values stay in 16 bits
    k_scale, v_scale  float32 [B, Hk, nb]
    k_shift, v_shift  float32 [B, Hk, D], the mean of a sample
    """

    k: torch.Tensor
    v: torch.Tensor | None
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    k_shift: torch.Tensor
    v_shift: torch.Tensor


class Tiling(NamedTuple):
    """Queries a program, keys a step, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def listed_blocks(inputs: Inputs, prepared: Prepared) -> Partial:
    """Attention of every tiled query block over its listed key blocks alone; nothing in the rows of isolated ones."""
    tiled, lists = prepared.tiled, prepared.lists
    batch, heads, rows, head_dim = tiled.q.shape
    b, nb = inputs.blocks.block_size, inputs.blocks.num_blocks
    out = torch.empty_like(tiled.q)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    arch, values = arch_of(out.device), inputs.config.precision == "fp8"
    in_gluon = values and head_dim == 128 and why_not_gluon(arch, b, head_dim) is None
    of = quantise(inputs, tiled, as_operand=in_gluon)
    turns = longest_first(lists.counts[..., :nb].contiguous())
    if in_gluon:
        from . import hopper_eight_bits

        hopper_eight_bits.launch(inputs, tiled, lists, of, turns, out, lse, most(values), _ROOM)
        return Partial(out, lse, isolated=False)
    tiling = tiling_of(arch, b, head_dim)
    columns = columns_of(head_dim)
    if of.v is None:
        v_desc = rows_of(tiled.v, tiling.block_n)
    else:
        v_desc = TensorDescriptor.from_tensor(of.v.view(-1, b), [columns, tiling.block_n])
    _listed_kernel[(nb * b // tiling.block_m, batch * heads)](
        rows_of(tiled.q, tiling.block_m), rows_of(of.k, tiling.block_n), v_desc,
        of.k_scale, of.v_scale, of.v_scale.nan_to_num(0.0).amax(-1), of.k_shift, of.v_shift,
        lists.counts, lists.indices, turns, out, lse, inputs.group, nb, rows, inputs.scale / math.log(2),
        BLOCK=b, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, HEAD_DIM=head_dim, COLUMNS=columns,
        MOST=most(of.v is not None), VALUES=of.v is not None, ROOM=_ROOM,
        WIDEN=interpreted(), num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return Partial(out, lse, isolated=False)


def tiling_of(arch: str, block: int, head_dim: int) -> Tiling:
    """arch: the compute capability, as in "90"."""
    if arch in ROOMY:
        return Tiling(64, min(block, 128) if head_dim <= 128 else 64, 4, 2)
    return Tiling(64, 64 if head_dim <= 128 else 32, 4, 2)


def most(values: bool) -> float:
    """The largest number: of e4m3 where values are in 8 bits, too, else of int8."""
    return 448.0 if values else 127.0


def quantise(inputs: Inputs, tiled: Tiled, as_operand: bool) -> Quantised:
    """as_operand: keys of a block in another order, which makes the registers of their scores those of an operand."""
    batch, key_heads, _, head_dim = tiled.k.shape
    b, nb = inputs.blocks.block_size, inputs.blocks.num_blocks
    values = inputs.config.precision == "fp8"
    k_shift = _shift(inputs.k, inputs)
    v_shift = _shift(inputs.v, inputs) if values else torch.zeros_like(k_shift)
    k_scale, v_scale = torch.ones(2, batch, key_heads, nb, dtype=torch.float32, device=tiled.k.device)
    k8 = torch.empty_like(tiled.k, dtype=torch.float8_e4m3fn if values else torch.int8)
    v8 = None
    if values:
        v8 = tiled.v.new_empty(batch, key_heads, nb, head_dim, b, dtype=torch.float8_e4m3fn)
    _quantise_kernel[(nb, batch * key_heads, 2 if values else 1)](
        tiled.k, tiled.v, k_shift, v_shift, k8, v8, k_scale, v_scale, nb,
        BLOCK=b, HEAD_DIM=head_dim, COLUMNS=columns_of(head_dim),
        MOST=most(values), VALUES=values, AS_OPERAND=as_operand, num_warps=4,
    )  # fmt: skip
    return Quantised(k8, v8, k_scale, v_scale, k_shift, v_shift)


def _shift(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[B, Hk, D], the mean of a sample of x [B, S, Hk, D]; 0 where that is not finite."""
    sample = sample_of(x, inputs.blocks.tiled)
    return sample.mean(1).nan_to_num(0.0, 0.0, 0.0).view(len(x), x.shape[2], x.shape[3])


@triton.jit
def _scaled(x_ptr, shift_ptr, scale_ptr, at, i, d, HEAD_DIM: tl.constexpr, MOST: tl.constexpr):
    """A block less the shift, divided by what makes its largest number MOST; stores that. [BLOCK, COLUMNS]"""
    there = d[None, :] < HEAD_DIM
    x = tl.load(x_ptr + i[:, None] * HEAD_DIM + d[None, :], mask=there, other=0.0).to(tl.float32)
    x -= tl.load(shift_ptr + d, mask=d < HEAD_DIM, other=0.0)[None, :]
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / MOST, 1e-30)
    finite = tl.min(tl.min((x - x == 0).to(tl.int32), 1), 0)  # 8 bits hold no NaN: the scale does
    scale = tl.where(finite != 0, scale, float("nan"))
    tl.store(scale_ptr + at, scale)
    return x / scale


@triton.jit
def _quantise_kernel(
    k_ptr, v_ptr, k_shift_ptr, v_shift_ptr, k8_ptr, v8_ptr, k_scale_ptr, v_scale_ptr, num_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr,
    VALUES: tl.constexpr, AS_OPERAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    at = head * num_blocks + tl.program_id(0)
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, COLUMNS)
    first = at * BLOCK * HEAD_DIM
    there = d[None, :] < HEAD_DIM
    if tl.program_id(2) == 0:
        # [BLOCK, COLUMNS]
        x = _scaled(k_ptr + first, k_shift_ptr + head * HEAD_DIM, k_scale_ptr, at, i, d, HEAD_DIM, MOST)
        if not VALUES:
            x = tl.floor(x + 0.5)
        row = i
        if AS_OPERAND:  # of every 16 keys number 4 t + 2 h + e comes to row 8 h + 2 t + e
            row = i // 16 * 16 + i // 2 % 2 * 8 + i // 4 % 4 * 2 + i % 2
        to = k8_ptr + first + row[:, None] * HEAD_DIM + d[None, :]
        tl.store(to, x.to(k8_ptr.dtype.element_ty), mask=there)
    elif VALUES:
        # [COLUMNS, BLOCK]: tensor cores take 8-bit values key by key
        x_v = _scaled(v_ptr + first, v_shift_ptr + head * HEAD_DIM, v_scale_ptr, at, i, d, HEAD_DIM, MOST).T
        to_v = v8_ptr + first + d[:, None] * BLOCK + i[None, :]
        tl.store(to_v, x_v.to(v8_ptr.dtype.element_ty), mask=d[:, None] < HEAD_DIM)


@triton.jit
def _product(a, b, WIDEN: tl.constexpr):
    """a @ b in float32. WIDEN: what interprets kernels on a CPU multiplies no 8-bit floats."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b).to(tl.float32)


@triton.jit
def _listed_kernel(
    q_desc, k_desc, v_desc, k_scale_ptr, v_scale_ptr, v_most_ptr, k_shift_ptr, v_shift_ptr,
    count_ptr, index_ptr, turn_ptr, out_ptr, lse_ptr, group, num_blocks, rows, scale,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    MOST: tl.constexpr, VALUES: tl.constexpr, ROOM: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    key_head = head // group
    parts: tl.constexpr = BLOCK // BLOCK_M
    n = tl.load(turn_ptr + head * num_blocks + tl.program_id(0) // parts)  # the longest start first
    first = n * BLOCK + tl.program_id(0) % parts * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, COLUMNS)
    there = d < HEAD_DIM
    own = head.to(tl.int64) * rows + i
    # [BLOCK_M, COLUMNS]
    q = q_desc.load([head * rows + first, 0]).to(tl.float32)
    k_shift = tl.load(k_shift_ptr + key_head * HEAD_DIM + d, mask=there, other=0.0)
    # [BLOCK_M]
    shared = tl.sum(q * k_shift[None, :], 1) * scale
    q_scale = tl.where(shared == shared, tl.maximum(tl.max(tl.abs(q), 1) / MOST, 1e-30), shared)
    q = q / q_scale[:, None]
    if not VALUES:
        q = tl.floor(q + 0.5)
    # [BLOCK_M, COLUMNS]
    q8 = q.to(k_desc.dtype)
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    v_most = tl.load(v_most_ptr + key_head)
    listed = head.to(tl.int64) * (rows // BLOCK) + n
    index_row = index_ptr + listed * num_blocks
    steps: tl.constexpr = BLOCK // BLOCK_N
    count = tl.load(count_ptr + listed) * steps
    for j in tl.range(0, count):
        block = key_head * num_blocks + tl.load(index_row + j // steps)
        at = block * BLOCK + j % steps * BLOCK_N
        factor = q_scale * (tl.load(k_scale_ptr + block) * scale)
        # [BLOCK_M, BLOCK_N]
        score = _product(q8, k_desc.load([at, 0]).T, WIDEN)
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        shrink = tl.exp2(top - new_top)
        if VALUES:
            # weights carry the scale of the block's values, relative to the largest of the head
            relative = tl.load(v_scale_ptr + block) / v_most
            p = tl.exp2(score * factor[:, None] - (new_top - ROOM - tl.log2(relative))[:, None])
            total = total * shrink + tl.sum(p, 1) / relative
            v = v_desc.load([block * HEAD_DIM, j % steps * BLOCK_N]).T
            acc = acc * shrink[:, None] + _product(p.to(v.dtype), v, WIDEN)
        else:
            p = tl.exp2(score * factor[:, None] - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            v = v_desc.load([at, 0])
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    v_shift = tl.load(v_shift_ptr + key_head * HEAD_DIM + d, mask=there, other=0.0)
    some = tl.where(total == 0, 1.0, total)  # NaN stays
    lse = top + tl.log2(some)
    if VALUES:
        acc *= v_most
        lse -= ROOM
    out = acc / some[:, None] + v_shift[None, :]
    tl.store(out_ptr + own[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=there[None, :])
    tl.store(lse_ptr + own, (lse + shared) * 0.6931471805599453)
