"""The listed blocks in fp8 on Hopper, in Gluon. Who does what is as in hopper.py.

Every step's product of weights and values is of its own, and added in float32: inside tensor cores sums of 8-bit
products keep few bits.
"""

import math
from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...method.inputs import Inputs
from . import BlockLists
from .hopper import _HALF, BLOCK, _next, _send_both
from .tile import Tiled

if TYPE_CHECKING:
    from .eight_bits import Quantised

_LN_2 = gl.constexpr(0.6931471805599453)


def launch(
    inputs: Inputs,
    tiled: Tiled,
    lists: BlockLists,
    of: "Quantised",
    turns: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    most: float,
    room: int,
    stages: int = 3,
) -> None:
    """What the kernel of eight_bits.py computes with 8-bit values, for blocks and heads of 128, into out and lse.

    Keys of a block in `of` are in the order of an operand. stages: how many tiles of keys and values are under way.
    """
    assert of.v is not None
    batch, heads, rows, _ = tiled.q.shape
    v_most = of.v_scale.nan_to_num(0.0).amax(-1)
    lift = (of.v_scale / v_most[..., None]).log2()
    _listed_kernel[(inputs.blocks.num_blocks, batch * heads)](
        tiled.q, _tiles_of(of.k), _tiles_of(of.v), of.k_scale, lift, v_most, of.k_shift, of.v_shift,
        lists.counts, lists.indices, turns, out, lse,
        inputs.group, inputs.blocks.num_blocks, rows // BLOCK, inputs.scale / math.log(2),
        MOST=most, ROOM=room, STAGES=stages, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tiles_of(x: torch.Tensor) -> TensorDescriptor:
    """x: float8 [..., 128, 128], contiguous, read one such tile at a time."""
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], gl.float8e4nv)
    return TensorDescriptor.from_tensor(x.view(-1, BLOCK), [BLOCK, BLOCK], layout)


@gluon.jit
def _load(k_desc, v_desc, ring, index_row, listed, first_block, STAGES: gl.constexpr):
    """One warp: the tiles of listed blocks, [keys, HEAD_DIM] and [HEAD_DIM, keys]."""
    slot = 0
    phase = 1
    block = gl.load(index_row, mask=listed > 0, other=0)
    for j in range(gl.maximum(listed, 1)):
        upcoming = gl.load(index_row + j + 1, mask=j + 1 < listed, other=0)
        at = (first_block + block) * k_desc.block_type.shape[0]
        slot, phase = _send_both(k_desc, v_desc, at, ring, slot, phase, STAGES)
        block = upcoming


@gluon.jit
def _softmax(score, top, total, factor, lift, ROOM: gl.constexpr):
    """Weights [_HALF, keys] carry the scale of their block's values over the largest of the head, 2^lift."""
    new_top = gl.maximum(top, gl.max(score, 1) * factor)
    shrink = gl.exp2(top - new_top)
    p = gl.exp2(score * factor[:, None] - (new_top - (ROOM + lift))[:, None])
    return _packed(p), new_top, total * shrink + gl.sum(p, 1) * gl.exp2(-lift), shrink


@gluon.jit
def _packed(p):
    """Four weights in an int32, as the registers of an operand hold them: what registers of a product hold, key 16 a +
    8 h + 2 t + e, comes to place 16 a + 4 t + 2 h + e. [_HALF, keys / 16, 4]
    """
    even, odd = p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).split()
    a, c = even.split()
    b, d = odd.split()
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _moved(x):
    """x in other registers, from here on: those of an operand must not be written while its product goes on."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _operand(packed, layout: gl.constexpr):
    a, b = packed.to(gl.int8), (packed >> 8).to(gl.int8)
    c, d = (packed >> 16).to(gl.int8), (packed >> 24).to(gl.int8)
    p = gl.join(gl.join(a, c), gl.join(b, d)).reshape([packed.shape[0], packed.shape[1] * packed.shape[2] * 4])
    return gl.convert_layout(p.to(gl.float8e4nv, bitcast=True), layout, assert_trivial=True)


@gluon.jit
def _multiply(common, PART: gl.constexpr, ROOM: gl.constexpr, MOST: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 64 queries, rounded here, over all tiles that are sent."""
    (
        q_ptr, out_ptr, lse_ptr, q_tile, ring, turn, k_scale_ptr, lift_ptr, v_most, k_shift_ptr, v_shift_ptr,
        index_row, listed, scale,
    ) = common  # fmt: skip
    k_ring, v_ring, k_full, v_full, k_empty, v_empty = ring
    head_dim: gl.constexpr = k_ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 32])
    of_p: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    i = PART * _HALF + gl.arange(0, _HALF, of_row)
    d = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    place = i[:, None] * head_dim + d[None, :]
    # [_HALF, HEAD_DIM]
    q = gl.load(q_ptr + place).to(gl.float32)
    # [_HALF]
    shared = gl.sum(q * gl.load(k_shift_ptr + d)[None, :], 1) * scale
    q_scale = gl.where(shared == shared, gl.maximum(gl.max(gl.abs(q), 1) / MOST, 1e-30), shared)
    q8 = q_tile.index(PART)
    q8.store((q / q_scale[:, None]).to(gl.float8e4nv))
    fence_async_shared()
    q_scale *= scale
    nothing = gl.zeros([_HALF, head_dim], gl.float32, layout)
    # [_HALF, HEAD_DIM]
    acc = nothing
    top = gl.full([_HALF], float("-inf"), gl.float32, of_row)
    total = gl.zeros([_HALF], gl.float32, of_row)
    block = gl.load(index_row, mask=listed > 0, other=0)
    k_scale, lift = gl.load(k_scale_ptr + block), gl.load(lift_ptr + block)
    block = gl.load(index_row + 1, mask=listed > 1, other=0)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(turn.index(PART), PART ^ 1)
    score = warpgroup_mma(q8, k_ring.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index(1 - PART))
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_empty.index(0))
    p, top, total, shrink = _softmax(score, top, total, q_scale * k_scale, lift, ROOM)
    mbarrier.wait(v_full.index(0), 0)
    slot = 0
    phase = 0
    now = PART
    for j in range(1, listed):
        last = slot
        slot, phase = _next(slot, phase, STAGES)
        k_scale, lift = gl.load(k_scale_ptr + block), gl.load(lift_ptr + block)
        block = gl.load(index_row + j + 1, mask=j + 1 < listed, other=0)
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(turn.index(PART), now)
        now ^= 1
        operand = _operand(p, of_p)
        score = warpgroup_mma(q8, k_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        v = v_ring.index(last).permute((1, 0))
        product = warpgroup_mma(operand, v, nothing, use_acc=False, is_async=True)
        mbarrier.arrive(turn.index(1 - PART))
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_empty.index(slot))
        last_shrink = shrink
        p_next, top, total, shrink = _softmax(score, top, total, q_scale * k_scale, lift, ROOM)
        mbarrier.wait(v_full.index(slot), phase)  # ptxas moves nothing over it: the softmax stays under the product
        product = warpgroup_mma_wait(0, deps=[product])
        p = _moved(p_next)
        acc = acc * last_shrink[:, None] + product
        mbarrier.arrive(v_empty.index(last))
    product = warpgroup_mma(
        _operand(p, of_p), v_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    acc = acc * shrink[:, None] + warpgroup_mma_wait(0, deps=[product])
    none = listed == 0
    total = gl.where(none, 0.0, total)
    some = gl.where(total == 0.0, 1.0, total)  # NaN stays
    out = gl.where(none, 0.0, acc) * (v_most / some)[:, None] + gl.load(v_shift_ptr + d)[None, :]
    gl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))
    lse = gl.where(none, float("-inf"), top + gl.log2(some) - ROOM + shared)
    gl.store(lse_ptr + i, lse * _LN_2)


@gluon.jit
def _listed_kernel(
    q_ptr, k_desc, v_desc, k_scale_ptr, lift_ptr, v_most_ptr, k_shift_ptr, v_shift_ptr,
    count_ptr, index_ptr, turn_ptr, out_ptr, lse_ptr, group, num_blocks, query_blocks, scale,
    MOST: gl.constexpr, ROOM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    block: gl.constexpr = 2 * _HALF
    head_dim: gl.constexpr = k_desc.block_type.shape[1]
    of_barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tile = gl.allocate_shared_memory(k_desc.dtype, [2, _HALF, head_dim], k_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, block, head_dim], k_desc.layout)
    v_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, head_dim, block], v_desc.layout)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], of_barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    for part in gl.static_range(2):
        mbarrier.init(turn.index(part), 1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), 1)
        mbarrier.init(v_full.index(slot), 1)
        mbarrier.init(k_empty.index(slot), 2)
        mbarrier.init(v_empty.index(slot), 2)

    head = gl.program_id(1)
    key_head = head // group
    n = gl.load(turn_ptr + head * num_blocks + gl.program_id(0))  # the longest start first
    at = head * query_blocks + n
    listed = gl.load(count_ptr + at)
    index_row = index_ptr + at.to(gl.int64) * num_blocks
    first_row = at.to(gl.int64) * block
    first_block = key_head * num_blocks
    v_most = gl.load(v_most_ptr + key_head)
    ring = (k_ring, v_ring, k_full, v_full, k_empty, v_empty)
    common = (
        q_ptr + first_row * head_dim, out_ptr + first_row * head_dim, lse_ptr + first_row, q_tile, ring, turn,
        k_scale_ptr + first_block, lift_ptr + first_block, v_most,
        k_shift_ptr + key_head * head_dim, v_shift_ptr + key_head * head_dim, index_row, listed, scale,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (common, 0, ROOM, MOST, STAGES)),
            (_multiply, (common, 1, ROOM, MOST, STAGES)),
            (_load, (k_desc, v_desc, ring, index_row, listed, first_block, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
