"""Stage 1 on a GPU: one pass that puts q, k, v into block order and pools every block."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...method.inputs import Inputs
from ...method.pool import Pooled
from ...method.residual import Responses
from . import columns_of
from .directions import moments, of_errors
from .halves import store_halves


class Tiled(NamedTuple):
    """q, k, v in block order, and what was learned on the way.

    q               [B, H, rows, D]: the nb tiled blocks, then the isolated tokens, then zeros up to whole blocks
    k, v            [B, Hk, nb*b, D], the tiled blocks
    k_tail, v_tail  [B, Hk, rows - nb*b, D], the isolated tokens; zeros where a token is not valid
    pooled          block statistics, each [2, B, H or Hk, nb, D]: the float32 value as the sum of two bfloat16, right
                    to 16 bits, so that tensor cores can multiply it (float32 and zeros where there are none)
    k_pool, v_pool  [B, Hk, nb up to a multiple of 128, D], where there is a tail: means once more, in the inputs'
                    dtype, then zeros
    responses       where blocks are chosen by error: each [2, B, H or Hk, nb, r, r], as the sum of two like `pooled`
    tail_bias       float32 [B, rows - nb*b], what to add to an isolated key's logit: 0, or -inf where it is not valid
    tail_end        int32 [B], isolated keys from here on are not valid
    order           int32 [B, Hk, nb*b], contiguous: where in the sequence the tiled rows of a head come from, if heads
                    differ; None: from blocks.places, as all other rows
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor
    pooled: Pooled
    tail_bias: torch.Tensor
    tail_end: torch.Tensor
    order: torch.Tensor | None
    k_pool: torch.Tensor | None = None
    v_pool: torch.Tensor | None = None
    responses: Responses | None = None


def tile(inputs: Inputs) -> Tiled:
    """One pass over q, k, v. config.rule says which statistics are wanted, inputs.block_mask that no choice is."""
    q, k, v, blocks, rule = inputs.q, inputs.k, inputs.v, inputs.blocks, inputs.config.rule
    batch, _, heads, head_dim = q.shape
    key_heads = k.shape[2]
    b, nb = blocks.block_size, blocks.num_blocks
    rows, tiled = blocks.places.numel(), blocks.tiled.numel()
    order = None if inputs.token_order is None else inputs.token_order.int().contiguous()
    tail_bias = torch.empty(batch, rows - tiled, dtype=torch.float32, device=q.device)
    tail_end = torch.empty(batch, dtype=torch.int32, device=q.device)
    q_out = q.new_empty(batch, heads, rows, head_dim)
    sizes = (tiled, tiled, rows - tiled, rows - tiled)
    k_out, v_out, k_tail, v_tail = (q.new_empty(batch, key_heads, n, head_dim) for n in sizes)
    half = torch.bfloat16 if q.is_cuda else torch.float32
    gain = rule.gate == "gain"
    wanted = {"q": True, "k": True, "v": True, "dq": gain, "dk": gain, "k_var": rule.tail}
    pooled = Pooled(
        **{
            name: q.new_empty(2, batch, heads if name in ("q", "dq") else key_heads, nb, head_dim, dtype=half)
            for name, want in wanted.items()
            if want
        }
    )
    in_pool = (batch, key_heads, nb + -nb % 128, head_dim)
    k_pool, v_pool = (q.new_empty(in_pool), q.new_empty(in_pool)) if rule.tail else (None, None)
    responses, rank = None, 0
    for_responses: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if nb and rule.choice == "error" and inputs.block_mask is None:
        seen = of_errors(moments(q, k, blocks.tiled, inputs.scale), key_heads, inputs.scale, q.dtype)
        rank = seen.k.shape[3]
        of = (heads, key_heads)
        responses = Responses(*(q.new_empty(2, batch, each, nb, rank, rank, dtype=half) for each in of))
        for_responses = (*seen, *responses)
    _tile_kernel[(rows // b * heads, batch, 2 if rank else 3)](
        q, k, v, q_out, k_out, v_out, k_tail, v_tail,
        pooled.q, pooled.k, pooled.v, pooled.dq, pooled.dk, pooled.k_var, k_pool, v_pool, order, blocks.places,
        inputs.text_mask, tail_bias, tail_end, *for_responses,
        *q.stride(), *k.stride(), *v.stride(), *inputs.text_mask.stride(),
        heads, inputs.group, nb, rows, batch * heads * nb * head_dim, in_pool[2], blocks.leftover, blocks.text,
        BLOCK=b, HEAD_DIM=head_dim, COLUMNS=columns_of(head_dim), GAIN=gain, TAIL=rule.tail, RANK=rank, WIDTH=16,
        num_warps=4 if head_dim <= 128 else 8,
    )  # fmt: skip
    return Tiled(q_out, k_out, v_out, k_tail, v_tail, pooled, tail_bias, tail_end, order, k_pool, v_pool, responses)


@triton.jit
def _tile_kernel(
    q_ptr, k_ptr, v_ptr,
    q_out, k_out, v_out, k_tail, v_tail,
    q_mean, k_mean, v_mean, q_deviation, k_deviation, k_variance, k_pool, v_pool,
    order_ptr, places_ptr, valid_ptr, bias_ptr, end_ptr, to_q_ptr, to_k_ptr, q_response, kv_response,
    q_sb, q_ss, q_sh, q_sd,
    k_sb, k_ss, k_sh, k_sd,
    v_sb, v_ss, v_sh, v_sd,
    valid_sb, valid_st,
    heads, group, num_blocks, rows, half, pool_rows, leftover, text,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, GAIN: tl.constexpr, TAIL: tl.constexpr,
    RANK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # heads vary fastest: programs that run together read neighbouring memory of [B, S, H, D]
    n, h, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    own, h = batch * heads + h, h.to(tl.int64)
    at = own // group  # the key head
    if (which > 0) & (h >= heads // group):
        return
    if which > 0:
        at = batch * (heads // group) + h
        half = half // group
    valid_ptr += batch * valid_sb
    if (which == 1) & (h == 0):
        _tell_valid(bias_ptr, end_ptr, valid_ptr, batch, n, num_blocks, rows, valid_st, leftover, text, BLOCK)
    # [BLOCK]
    i = n * BLOCK + tl.arange(0, BLOCK)
    place = place_of(order_ptr, places_ptr, at, n, i, num_blocks, BLOCK)
    if which > 0:
        place = tl.where(_valid(valid_ptr, i - num_blocks * BLOCK, valid_st, leftover, text), place, -1)
    half_responses = half // HEAD_DIM * RANK * RANK
    from_v = v_ptr + batch * v_sb + h * v_sh
    rows_v = v_out + (at * num_blocks + n) * BLOCK * HEAD_DIM
    if which == 0:
        from_q = q_ptr + batch * q_sb + h * q_sh
        rows_out = q_out + (own * rows + n * BLOCK) * HEAD_DIM
        q, _ = _tile(from_q, q_ss, q_sd, rows_out, q_out, q_mean, q_deviation, None, None, place,
                     own, n, num_blocks, rows, half, pool_rows, BLOCK, HEAD_DIM, COLUMNS,
                     KEYS=False, DEVIATION=GAIN, VARIANCE=False, POOL=False)  # fmt: skip
        if RANK > 0 and n < num_blocks:
            # [BLOCK, WIDTH]
            to_q = _directions(to_q_ptr, at, HEAD_DIM, COLUMNS, RANK, WIDTH)
            seen = tl.dot(q, to_q, input_precision="ieee").to(q.dtype)
            responds = (own * num_blocks + n) * RANK * RANK
            _store_response(q_response + responds, half_responses, tl.trans(seen), seen, BLOCK, RANK, WIDTH)
    elif which == 1:
        from_k = k_ptr + batch * k_sb + h * k_sh
        rows_out = k_out + (at * num_blocks + n) * BLOCK * HEAD_DIM
        k, apart = _tile(from_k, k_ss, k_sd, rows_out, k_tail, k_mean, k_deviation, k_variance, k_pool, place,
                         at, n, num_blocks, rows, half, pool_rows, BLOCK, HEAD_DIM, COLUMNS,
                         KEYS=True, DEVIATION=GAIN, VARIANCE=TAIL, POOL=TAIL)  # fmt: skip
        if RANK > 0:
            # [WIDTH, BLOCK]
            to_k = _directions(to_k_ptr, at, HEAD_DIM, COLUMNS, RANK, WIDTH)
            seen = tl.dot(apart.to(k.dtype), to_k, input_precision="ieee").to(k.dtype)
            _, apart_v = _tile(from_v, v_ss, v_sd, rows_v, v_tail, v_mean, None, None, v_pool, place,
                               at, n, num_blocks, rows, half, pool_rows, BLOCK, HEAD_DIM, COLUMNS,
                               KEYS=True, DEVIATION=False, VARIANCE=False, POOL=TAIL)  # fmt: skip
            if n < num_blocks:
                # [WIDTH, HEAD_DIM]
                follow = tl.dot(tl.trans(seen), apart_v.to(k.dtype), input_precision="ieee") / BLOCK
                follow = follow.to(k.dtype)
                responds = (at * num_blocks + n) * RANK * RANK
                _store_response(kv_response + responds, half_responses, follow, tl.trans(follow), 1, RANK, WIDTH)
    elif RANK == 0:
        _tile(from_v, v_ss, v_sd, rows_v, v_tail, v_mean, None, None, v_pool, place,
              at, n, num_blocks, rows, half, pool_rows, BLOCK, HEAD_DIM, COLUMNS,
              KEYS=True, DEVIATION=False, VARIANCE=False, POOL=TAIL)  # fmt: skip


@triton.jit
def place_of(order_ptr, places_ptr, key_head, n, i, num_blocks, BLOCK: tl.constexpr):
    """Where in the sequence rows i of block n of a head come from, -1 where from nowhere: int64."""
    if order_ptr is not None:  # noqa: SIM102, as the first is decided when this is compiled
        if n < num_blocks:
            places_ptr = order_ptr + key_head * num_blocks * BLOCK
    return tl.load(places_ptr + i).to(tl.int64)


@triton.jit
def _valid(valid_ptr, i, valid_st, leftover, text):
    """Whether isolated keys are valid; tiled ones, below 0, are."""
    word = i - leftover
    is_text = (word >= 0) & (word < text)
    return (i < leftover) | (tl.load(valid_ptr + word * valid_st, mask=is_text, other=0) != 0)


@triton.jit
def _tell_valid(
    bias_ptr, end_ptr, valid_ptr, batch, n, num_blocks, rows, valid_st, leftover, text, BLOCK: tl.constexpr
):  # fmt: skip
    """The bias of the isolated keys of a block and, with the last block, where valid ones end."""
    tail = rows - num_blocks * BLOCK
    # [BLOCK]
    i = tl.arange(0, BLOCK)
    if n >= num_blocks:
        own = (n - num_blocks) * BLOCK + i
        bias = tl.where(_valid(valid_ptr, own, valid_st, leftover, text), 0.0, float("-inf"))
        tl.store(bias_ptr + batch * tail + own, bias)
    if n == rows // BLOCK - 1:
        end = 0
        for start in tl.range(0, tail, BLOCK):
            valid = _valid(valid_ptr, start + i, valid_st, leftover, text)
            end = tl.maximum(end, tl.max(tl.where(valid, start + i + 1, 0), 0))
        tl.store(end_ptr + batch, end)


@triton.jit
def _directions(from_ptr, head, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """[COLUMNS, WIDTH], zeros beyond [HEAD_DIM, RANK]."""
    d = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    at = (head * HEAD_DIM + d[:, None]) * RANK + r[None, :]
    return tl.load(from_ptr + at, mask=(d[:, None] < HEAD_DIM) & (r[None, :] < RANK), other=0.0)


@triton.jit
def _store_response(to_ptr, half, a, b, count, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """a @ b / count, [WIDTH, WIDTH], of which [RANK, RANK] are stored."""
    product = tl.dot(a, b, input_precision="ieee") / count
    r = tl.arange(0, WIDTH)
    to = to_ptr + r[:, None] * RANK + r[None, :]
    store_halves(to, half, product, (r[:, None] < RANK) & (r[None, :] < RANK))


@triton.jit
def _tile(
    from_ptr, stride_s, stride_d, to_ptr, tail_ptr, mean_ptr, deviation_ptr, variance_ptr, pool_ptr, place,
    head, n, num_blocks, rows, half, pool_rows,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, DEVIATION: tl.constexpr, VARIANCE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """One block of one tensor: its tokens, zeros where a place is negative, and how far they are from their mean in
    float32. KEYS: isolated tokens go to a tensor of their own.
    """
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, COLUMNS)
    there = d < HEAD_DIM
    tail = n - num_blocks
    if KEYS and tail >= 0:
        to_ptr = tail_ptr + (head * (rows - num_blocks * BLOCK) + tail * BLOCK) * HEAD_DIM
    # [BLOCK, COLUMNS]
    at = place[:, None] * stride_s + d[None, :].to(tl.int64) * stride_d
    x = tl.load(from_ptr + at, mask=(place >= 0)[:, None] & there[None, :], other=0.0)
    tl.store(to_ptr + i[:, None] * HEAD_DIM + d[None, :], x, mask=there[None, :])
    wide = x.to(tl.float32)
    # [COLUMNS]
    mean = tl.sum(wide, 0) / BLOCK
    apart = wide - mean[None, :]
    if tail < 0:
        pooled = (head * num_blocks + n) * HEAD_DIM + d
        store_halves(mean_ptr + pooled, half, mean, there)
        if DEVIATION:
            store_halves(deviation_ptr + pooled, half, tl.sum(tl.abs(apart), 0) / BLOCK, there)
        if VARIANCE:
            store_halves(variance_ptr + pooled, half, tl.sum(apart * apart, 0) / BLOCK, there)
        if POOL:
            to_pool = pool_ptr + head * pool_rows * HEAD_DIM
            tl.store(to_pool + n * HEAD_DIM + d, mean.to(x.dtype), mask=there)
            if tail == -1:  # what is multiplied by nothing must be a number
                behind = num_blocks + tl.arange(0, 128)
                to = to_pool + behind[:, None] * HEAD_DIM + d[None, :]
                tl.store(to, tl.zeros((128, COLUMNS), x.dtype), mask=(behind < pool_rows)[:, None] & there[None, :])
    return x, apart
