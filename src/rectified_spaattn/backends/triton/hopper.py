"""Stage 6 on Hopper in Gluon, Triton's explicit layer: one warp loads keys and values, two groups of four multiply.

Each group has 64 queries of a block. Products of one run while the other, or its own step before, computes a softmax:
plain Triton gives every warp the same work.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...method.inputs import Inputs
from ...method.tail import CAP
from . import Prepared

BLOCK = 128
_HALF = gl.constexpr(64)  # queries of a group of warps
_STEP = gl.constexpr(128)  # keys of a step
_LOG2_E = gl.constexpr(1.4426950408889634)
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # since Triton 3.9
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name before Triton 3.8


def attend(
    inputs: Inputs,
    prepared: Prepared,
    query_blocks: int,
    turns: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """What `attend` of attend.py computes without a partial result, for blocks and heads of 128, into out and lse.

    query_blocks: how many; fewer than all are the last ones.
    turns: int32 [B, H, rows / b], which query block is whose turn, of all of them; None: the last first.
    """
    tiled, lists, (r, c, tail, slope) = prepared
    batch, heads, rows, head_dim = tiled.q.shape
    # a descriptor cannot be of nothing: queries stand in for keys that are absent, and never count
    pool = (tiled.q, tiled.q) if tail is None else (tail.k, tail.v)
    k_var = None if tail is None else tail.k_var
    keys = (x if x.numel() else tiled.q for x in (tiled.k, tiled.v, tiled.k_tail, tiled.v_tail, *pool))
    _attend_kernel[(query_blocks, batch * heads)](
        _rows_of(tiled.q, _HALF.value), *(_rows_of(x, _STEP.value) for x in keys),
        _rows_of(tiled.q if k_var is None else k_var, _STEP.value),
        _rows_of(tiled.q if slope is None else slope, head_dim),
        lists.counts, lists.indices, tiled.tail_bias, tiled.tail_end, tiled.tail_bias if tail is None else tail.bias,
        inputs.blocks.places if tiled.order is None else tiled.order, inputs.blocks.places,
        lists.counts if turns is None else turns, r, c,
        out, lse, *out.stride()[:3],
        heads, inputs.group, inputs.blocks.num_blocks, rows // BLOCK, pool[0].shape[2],
        inputs.scale / math.log(2), CAP / math.log(2),
        STAGES=2, TAIL=tail is not None, OWN=k_var is not None, ORDER=tiled.order is not None,
        TURNS=turns is not None, SLOPE=slope is not None, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _rows_of(x: torch.Tensor, count: int) -> TensorDescriptor:
    """x: [..., D], contiguous, read `count` rows at a time."""
    shape = [count, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[x.dtype])
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), shape, layout)


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wraps = slot == STAGES
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _as(tile, dtype: gl.constexpr):
    """The tile for numbers of another type, as many bits wide."""
    if tile.dtype == dtype:
        return tile
    elif _RENAMED:
        return tile.reinterpret(dtype, tile.shape, tile.layout)
    else:
        return tile._reinterpret(dtype, tile.shape, tile.layout)


@gluon.jit
def _send(desc, at, tiles, full, empty, slot, phase, STAGES: gl.constexpr):
    """Rows from row `at` on go to a slot of a ring, once both groups have done with what is there."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    _copy(desc, [at, 0], full.index(slot), _as(tiles.index(slot), desc.dtype))
    return _next(slot, phase, STAGES)


@gluon.jit
def _send_both(k_desc, v_desc, at, ring, slot, phase, STAGES: gl.constexpr):
    """Keys and values from row `at` on go to the same slot of both rings."""
    k_ring, v_ring, k_full, v_full, k_empty, v_empty = ring
    _send(k_desc, at, k_ring, k_full, k_empty, slot, phase, STAGES)
    return _send(v_desc, at, v_ring, v_full, v_empty, slot, phase, STAGES)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, k_tail_desc, v_tail_desc, k_pool_desc, v_pool_desc, k_var_desc, slope_desc,
    q_tile, q_full, ring, index_row, first_row, first_block, first_tail, first_pool, first_var, slope_row,
    listed, isolated, pooled, STAGES: gl.constexpr, SLOPE: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """One warp: the queries, then the tiles of listed blocks, isolated keys and pooled keys, then the slope."""
    k_ring, v_ring, k_full, v_full, k_empty, v_empty = ring
    for part in gl.static_range(2):
        mbarrier.expect(q_full.index(part), q_desc.block_type.nbytes)
        _copy(q_desc, [first_row + part * _HALF, 0], q_full.index(part), q_tile.index(part))
    slot = 0
    phase = 1
    block = gl.load(index_row, mask=listed > 0, other=0)
    for j in range(listed):
        upcoming = gl.load(index_row + j + 1, mask=j + 1 < listed, other=0)
        slot, phase = _send_both(k_desc, v_desc, (first_block + block) * _STEP, ring, slot, phase, STAGES)
        block = upcoming
    for j in range(isolated):
        slot, phase = _send_both(k_tail_desc, v_tail_desc, first_tail + j * _STEP, ring, slot, phase, STAGES)
    k_slot, k_phase = slot, phase
    for j in range(pooled):
        if OWN:
            at = first_var + j * _STEP
            k_slot, k_phase = _send(k_var_desc, at, k_ring, k_full, k_empty, k_slot, k_phase, STAGES)
        at = first_pool + j * _STEP
        k_slot, k_phase = _send(k_pool_desc, at, k_ring, k_full, k_empty, k_slot, k_phase, STAGES)
        slot, phase = _send(v_pool_desc, at, v_ring, v_full, v_empty, slot, phase, STAGES)
    if SLOPE:
        rows: gl.constexpr = slope_desc.block_type.shape[0]
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), slope_desc.block_type.nbytes)
        _copy(slope_desc, [slope_row, 0], v_full.index(slot), v_ring.index(slot).slice(0, rows))


@gluon.jit
def _softmax(score, top, total, scale):
    """score * scale is in powers of two. Weights [_HALF, _STEP], new top and total, what shrinks old sums."""
    new_top = gl.maximum(top, gl.max(score, 1) * scale)
    against = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = gl.exp2(top - against)
    p = gl.exp2(score * scale - against[:, None])
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _biased(score, tail_bias, pool_bias, j, isolated, tail, num_blocks, unit):
    """Scores of step j behind the listed blocks with the biases of its keys. [_HALF, _STEP]

    The first steps are of `isolated` tiles of isolated keys, those from there on of pooled ones. unit: what a bias of 1
    adds to a score.
    """
    key = gl.arange(0, _STEP, gl.SliceLayout(0, score.type.layout))
    pools = j >= isolated
    at = gl.where(pools, j - isolated, j) * _STEP + key
    end = gl.where(pools, num_blocks, tail)
    bias = gl.load(gl.where(pools, pool_bias, tail_bias) + at, mask=at < end, other=float("-inf"))
    return score + (bias * unit)[None, :]


@gluon.jit
def _multiply(
    common, PART: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, ORDER: gl.constexpr, SLOPE: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 queries over all tiles that are sent. Scores of a step are multiplied while those of the step
    before become weights: PART says which group has the first turn.
    """
    (
        out_ptr, lse_ptr, q_tile, q_full, ring, turn, square_tile, tail_bias, pool_bias, order_ptr, places_ptr,
        r_ptr, c_ptr, listed, isolated, pooled, n, num_blocks, tail, out_ss, scale, cap,
    ) = common  # fmt: skip
    k_ring, v_ring, k_full, v_full, k_empty, v_empty = ring
    head_dim: gl.constexpr = k_ring.type.shape[2]
    dtype: gl.constexpr = k_ring.dtype
    of_score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, of_score)
    of_out_row: gl.constexpr = gl.SliceLayout(1, of_out)
    q = q_tile.index(PART)
    nothing = gl.zeros([_HALF, _STEP], gl.float32, of_score)
    # [_HALF, HEAD_DIM]
    acc = gl.zeros([_HALF, head_dim], gl.float32, of_out)
    # [_HALF]
    top = gl.full([_HALF], float("-inf"), gl.float32, of_row)
    total = gl.zeros([_HALF], gl.float32, of_row)
    exact, exact_top = total, top
    mbarrier.wait(q_full.index(PART), 0)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(turn.index(PART), PART ^ 1)
    score = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index(1 - PART))
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_empty.index(0))
    if listed == 0:
        score = _biased(score, tail_bias, pool_bias, 0, isolated, tail, num_blocks, _LOG2_E / scale)
    p, top, total, shrink = _softmax(score, top, total, scale)
    p = gl.convert_layout(p.to(dtype), of_p)
    mbarrier.wait(v_full.index(0), 0)
    slot = 0
    phase = 0
    now = PART
    steps = listed + isolated
    if not OWN:
        steps += pooled
    for j in range(1, steps):
        if SLOPE and j == listed + isolated:
            exact, exact_top = total, top
        last = slot
        slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(turn.index(PART), now)
        now ^= 1
        score = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_ring.index(last), acc, is_async=True)
        mbarrier.arrive(turn.index(1 - PART))
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_empty.index(slot))
        if j >= listed:
            score = _biased(score, tail_bias, pool_bias, j - listed, isolated, tail, num_blocks, _LOG2_E / scale)
        p_next, top, total, shrink = _softmax(score, top, total, scale)
        p_next = gl.convert_layout(p_next.to(dtype), of_p)
        mbarrier.wait(v_full.index(slot), phase)  # ptxas moves nothing over it: the softmax stays under the product
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(last))
        acc = acc * gl.convert_layout(shrink, of_out_row)[:, None]
        p = p_next
    acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    last = slot
    slot, phase = _next(slot, phase, STAGES)
    if OWN:
        mbarrier.arrive(v_empty.index(last))
        exact, exact_top = total, top
        # [_HALF, HEAD_DIM]: times the variances of keys it is a half variance
        wide = q.load(of_out).to(gl.float32) * scale
        square = square_tile.index(PART)
        square.store((wide * wide * (0.5 / _LOG2_E)).to(square.dtype))
        fence_async_shared()
        k_slot, k_phase = slot, phase
        for j in range(pooled):
            mbarrier.wait(k_full.index(k_slot), k_phase)
            k_var = _as(k_ring.index(k_slot), square.dtype)
            half = warpgroup_mma(square, k_var.permute((1, 0)), nothing, use_acc=False, is_async=True)
            half = warpgroup_mma_wait(0, deps=[half])
            mbarrier.arrive(k_empty.index(k_slot))
            k_slot, k_phase = _next(k_slot, k_phase, STAGES)
            key = j * _STEP + gl.arange(0, _STEP, gl.SliceLayout(0, of_score))
            bias = gl.load(pool_bias + key, mask=key < num_blocks, other=float("-inf")) * _LOG2_E
            # what is added to a score is there before its product: both lie in the same registers
            half = gl.where(bias[None, :] == float("-inf"), float("-inf"), gl.minimum(half, cap) + bias[None, :])
            mbarrier.wait(k_full.index(k_slot), k_phase)
            k_pool = k_ring.index(k_slot).permute((1, 0))
            score = warpgroup_mma(q, k_pool, half * (1.0 / scale), is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(k_empty.index(k_slot))
            k_slot, k_phase = _next(k_slot, k_phase, STAGES)
            weights, top, total, shrink = _softmax(score, top, total, scale)
            weights = gl.convert_layout(weights.to(dtype), of_p)
            acc = acc * gl.convert_layout(shrink, of_out_row)[:, None]
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(slot))
            slot, phase = _next(slot, phase, STAGES)
    result = acc / gl.convert_layout(total, of_out_row)[:, None]
    if SLOPE:
        mbarrier.wait(v_full.index(slot), phase)
        slope = v_ring.index(slot).slice(0, head_dim)
        product = warpgroup_mma(q, slope, gl.zeros([_HALF, head_dim], gl.float32, of_out), use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=[product])
        # what pooled keys have of the softmax
        share = gl.where(n < num_blocks, 1.0 - exact * gl.exp2(exact_top - top) / total, 0.0)
        share = gl.convert_layout(share, of_out_row)[:, None]
        result += gl.where(share == 0.0, 0.0, product * share)
    if not TAIL:
        d = gl.arange(0, head_dim, gl.SliceLayout(0, of_out))
        r = gl.load(r_ptr, mask=n < num_blocks, other=1.0)
        result = result * r + gl.load(c_ptr + d, mask=n < num_blocks, other=0.0)[None, :]
    q.store(result.to(dtype))
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])
    i = (2 * n + PART) * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, by_row))
    # [_HALF]: where in the sequence
    place = gl.load(places_ptr + i).to(gl.int64)
    if ORDER:
        tiled = i < num_blocks * (2 * _HALF)
        place = gl.where(tiled, gl.load(order_ptr + i, mask=tiled, other=0).to(gl.int64), place)
    d_out = gl.arange(0, head_dim, gl.SliceLayout(0, by_row))
    to = out_ptr + place[:, None] * out_ss + d_out[None, :]
    gl.store(to, q.load(by_row), mask=place[:, None] >= 0)
    own = PART * _HALF + gl.arange(0, _HALF, of_row)
    gl.store(lse_ptr + own, (top + gl.log2(total)) * (1.0 / _LOG2_E))


@gluon.jit
def _attend_kernel(
    q_desc, k_desc, v_desc, k_tail_desc, v_tail_desc, k_pool_desc, v_pool_desc, k_var_desc, slope_desc,
    count_ptr, index_ptr, tail_bias_ptr, end_ptr, pool_bias_ptr, order_ptr, places_ptr, turn_ptr, r_ptr, c_ptr,
    out_ptr, lse_ptr, out_sb, out_ss, out_sh,
    heads, group, num_blocks, query_blocks, pool_rows, scale, cap,
    STAGES: gl.constexpr, TAIL: gl.constexpr, ORDER: gl.constexpr, TURNS: gl.constexpr, SLOPE: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    block: gl.constexpr = 2 * _HALF
    head_dim: gl.constexpr = q_desc.block_type.shape[1]
    dtype: gl.constexpr = q_desc.dtype
    of_barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tile = gl.allocate_shared_memory(dtype, [2, _HALF, head_dim], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, _STEP, head_dim], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, _STEP, head_dim], v_desc.layout)
    square_tile = q_tile
    if OWN:
        square_tile = gl.allocate_shared_memory(k_var_desc.dtype, [2, _HALF, head_dim], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], of_barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], of_barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), 1)
        mbarrier.init(turn.index(part), 1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), 1)
        mbarrier.init(v_full.index(slot), 1)
        mbarrier.init(k_empty.index(slot), 2)
        mbarrier.init(v_empty.index(slot), 2)

    head = gl.program_id(1)
    key_head = head // group
    batch, h = (head // heads).to(gl.int64), (head % heads).to(gl.int64)
    # blocks of isolated queries attend to every key: they start first
    n = query_blocks - 1 - gl.program_id(0)
    if TURNS:
        n = gl.load(turn_ptr + head * query_blocks + gl.program_id(0))
    at = head * query_blocks + n
    planned = head.to(gl.int64) * num_blocks + n
    tail = (query_blocks - num_blocks) * block
    index_row = index_ptr + at.to(gl.int64) * num_blocks
    listed = gl.load(count_ptr + at)
    isolated = gl.cdiv(gl.load(end_ptr + batch), _STEP)
    pooled = 0
    if TAIL:
        pooled = gl.where(n < num_blocks, gl.cdiv(num_blocks, _STEP), 0)
    # without any key, one tile that is masked whole: the row is NaN
    nothing = listed + isolated == 0
    if not OWN:
        nothing = nothing & (pooled == 0)
    isolated = gl.where(nothing, 1, isolated)
    tail_bias = tail_bias_ptr + batch * tail
    pool_bias = pool_bias_ptr
    if TAIL:
        pool_bias += planned * num_blocks
    order = order_ptr + key_head.to(gl.int64) * (num_blocks * block)
    out = out_ptr + batch * out_sb + h * out_sh
    lse = lse_ptr + at.to(gl.int64) * block
    ring = (k_ring, v_ring, k_full, v_full, k_empty, v_empty)
    common = (
        out, lse, q_tile, q_full, ring, turn, square_tile, tail_bias, pool_bias, order, places_ptr,
        r_ptr + planned, c_ptr + planned * head_dim, listed, isolated, pooled, n, num_blocks, tail, out_ss, scale, cap,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (common, 0, STAGES, TAIL, ORDER, SLOPE, OWN)),
            (_multiply, (common, 1, STAGES, TAIL, ORDER, SLOPE, OWN)),
            (_load, (
                q_desc, k_desc, v_desc, k_tail_desc, v_tail_desc, k_pool_desc, v_pool_desc, k_var_desc, slope_desc,
                q_tile, q_full, ring, index_row, at * block, key_head * num_blocks, key_head * tail,
                key_head * pool_rows, key_head * num_blocks, head * head_dim, listed, isolated, pooled,
                STAGES, SLOPE, OWN,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
