"""Stages 2, 4 and 5 on a GPU: the implicit full attention, gain, R and C."""

import math

import torch
import triton
import triton.language as tl

from ...method.estimate import pooled_columns
from ...method.inputs import Inputs
from ...method.plan import Choices
from ...method.rectify import Rectification
from ...method.tail import CAP, Tail
from . import BlockLists, columns_of
from .halves import dot_halves, halves
from .queries import told_by_queries
from .select import select
from .slope import slope
from .tile import Tiled


def decide(inputs: Inputs, tiled: Tiled) -> tuple[Choices, Rectification, BlockLists]:
    """Stages 2 to 5. Nothing here waits for the device."""
    nb, rule = inputs.blocks.num_blocks, inputs.config.rule
    choices, bias, lists = empty(inputs, tiled)
    new = torch.empty if rule.tail else torch.zeros
    c = new((0,) if rule.tail else tiled.pooled.q.shape[1:], dtype=torch.float32, device=tiled.q.device)
    if nb:
        residual = scores(inputs, tiled, choices, bias)
        select(inputs, choices, bias, lists, residual)
        del residual
        if rule.gate != "none" and not rule.tail:
            compensate(choices, tiled.pooled.v, c)
    else:
        lists.counts.zero_()
    tail, follow = None, None
    if nb and bias is not None and tiled.k_pool is not None and tiled.v_pool is not None:
        tail = Tail(tiled.k_pool, tiled.v_pool, bias, tiled.pooled.k_var if rule.queries else None)
        if rule.slope:
            follow = slope(inputs, tiled, choices, bias)
    return choices, Rectification(choices.r, c, tail, follow), lists


def empty(inputs: Inputs, tiled: Tiled) -> tuple[Choices, torch.Tensor | None, BlockLists]:
    """Not filled yet: the choices, for a tail its bias [B, H, nb, nb], and the lists."""
    batch, heads, rows, _ = tiled.q.shape
    nb, device = inputs.blocks.num_blocks, tiled.q.device
    square, listed = (batch, heads, nb, nb), (batch, heads, rows // inputs.blocks.block_size)
    choices = Choices(
        block_mask=torch.empty(square, dtype=torch.bool, device=device)
        if inputs.block_mask is None
        else inputs.block_mask,
        compensated=torch.empty(square, dtype=torch.bool, device=device),
        probability=torch.empty(batch, heads, nb, nb + 1, dtype=torch.float32, device=device),
        r=torch.empty(batch, heads, nb, dtype=torch.float32, device=device),
    )
    bias = torch.empty(square, dtype=torch.float32, device=device) if inputs.config.rule.tail else None
    lists = BlockLists(
        counts=torch.empty(listed, dtype=torch.int32, device=device),
        indices=torch.empty(*listed, max(nb, 1), dtype=torch.int32, device=device),
    )
    return choices, bias, lists


def scores(inputs: Inputs, tiled: Tiled, choices: Choices, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Fills choices.probability with the logits of the estimate, the last column being the log-sum-exp over isolated
    keys; choices.compensated, where the gate weighs the gain: is it above the error?; for a tail bias, what a pooled
    key adds to its logit. Where blocks are chosen by error gives their residuals, float32 [B, H, nb, nb]; but for the
    factor P where means tell them.
    """
    _, batch, heads, nb, head_dim = tiled.pooled.q.shape
    blocks, rule = inputs.blocks, inputs.config.rule
    k_tail, tail_bias = tiled.k_tail, tiled.tail_bias
    if rule.pooled_text:
        isolated = blocks.isolated.numel()
        k_tail, present = pooled_columns(
            k_tail[:, :, :isolated], tail_bias[:, :isolated] == 0, blocks.block_size, blocks.leftover
        )
        tail_bias = torch.zeros(present.shape, device=present.device).masked_fill_(~present, -torch.inf)
    pooled = tiled.pooled
    block = 64
    tiles = triton.cdiv(nb, block)
    log_b = math.log(blocks.block_size)
    residual, rank = None, 0
    responses: tuple[torch.Tensor | None, ...] = (None, None)
    if tiled.responses is not None:
        residual = torch.empty(batch, heads, nb, nb, dtype=torch.float32, device=k_tail.device)
        rank, responses = tiled.responses.q.shape[-1], tiled.responses
    _scores_kernel[(tiles * (tiles + 1), batch * heads)](
        pooled.q, pooled.dq, pooled.k, pooled.dk, pooled.k_var, k_tail, tail_bias,
        choices.probability, choices.compensated, bias, *responses, residual,
        k_tail.stride(0), k_tail.stride(1), k_tail.shape[2],
        heads, inputs.group, nb, batch * heads * nb * head_dim, inputs.scale, log_b if rule.log_b else 0.0, log_b, CAP,
        HEAD_DIM=head_dim, BLOCK=block, CHUNK=32, GAIN=rule.gate == "gain", TAIL=rule.tail,
        VARIANCE=rule.tail and not rule.queries, RESPONSE=rank * rank,
        num_warps=4, num_stages=2,  # with three Triton 3.6 gets the gain of heads of 96 wrong
    )  # fmt: skip
    if residual is not None and rule.queries:
        told_by_queries(inputs, tiled, residual)
    return residual


def compensate(choices: Choices, v_mean: torch.Tensor, c: torch.Tensor) -> None:
    """Fills c [B, H, nb, D]: the sum of P_nm v̄_m over compensated blocks m. v_mean: [2, B, Hk, nb, D] as in Tiled."""
    (batch, heads, nb, _), (*_, key_heads, _, head_dim) = choices.probability.shape, v_mean.shape
    _compensate_kernel[(triton.cdiv(nb, 64), batch * heads)](
        choices.probability, choices.compensated, v_mean, c, nb, c.numel(), heads // key_heads,
        HEAD_DIM=head_dim, COLUMNS=columns_of(head_dim), BLOCK=64, BLOCK_K=16, num_warps=4,
    )  # fmt: skip


@triton.jit
def _scores_kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, k_var_ptr, tail_ptr, tail_bias_ptr, logits_ptr, worth_ptr, bias_ptr,
    q_response_ptr, kv_response_ptr, residual_ptr,
    tail_sb, tail_sh, tail,
    heads, group, num_blocks, half, scale, log_b, tail_log_b, cap,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GAIN: tl.constexpr, TAIL: tl.constexpr,
    VARIANCE: tl.constexpr, RESPONSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_blocks, BLOCK)
    row, column = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    head = tl.program_id(1).to(tl.int64)
    n = row * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, CHUNK)
    key_head, key_half = head // group, half // group
    mean, key_mean = head * num_blocks * HEAD_DIM, key_head * num_blocks * HEAD_DIM
    row_logits = logits_ptr + (head * num_blocks + n) * (num_blocks + 1)
    if column < tiles:
        m = column * BLOCK + tl.arange(0, BLOCK)
        # [BLOCK, BLOCK]
        score = tl.zeros((BLOCK, BLOCK), tl.float32)
        q_error = tl.zeros((BLOCK, BLOCK), tl.float32)
        k_error = tl.zeros((BLOCK, BLOCK), tl.float32)
        variance = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in tl.range(0, HEAD_DIM, CHUNK):
            # [BLOCK, CHUNK]
            at_q = mean + n[:, None] * HEAD_DIM + start + d[None, :]
            at_k = key_mean + m[:, None] * HEAD_DIM + start + d[None, :]
            in_q, in_k = n[:, None] < num_blocks, m[:, None] < num_blocks
            q = tl.load(q_ptr + at_q, mask=in_q, other=0.0)
            q_low = tl.load(q_ptr + half + at_q, mask=in_q, other=0.0)
            k = tl.load(k_ptr + at_k, mask=in_k, other=0.0)
            k_low = tl.load(k_ptr + key_half + at_k, mask=in_k, other=0.0)
            score = dot_halves(q, q_low, k.T, k_low.T, score)
            if GAIN:
                dq = tl.load(dq_ptr + at_q, mask=in_q, other=0.0)
                dq_low = tl.load(dq_ptr + half + at_q, mask=in_q, other=0.0)
                q_error = dot_halves(dq, dq_low, k.T, k_low.T, q_error)
                dk = tl.load(dk_ptr + at_k, mask=in_k, other=0.0)
                dk_low = tl.load(dk_ptr + key_half + at_k, mask=in_k, other=0.0)
                k_error = dot_halves(q, q_low, dk.T, dk_low.T, k_error)
            if VARIANCE:
                wide = q.to(tl.float32) + q_low.to(tl.float32)
                square, square_low = halves(wide * wide, q.dtype)
                k_var = tl.load(k_var_ptr + at_k, mask=in_k, other=0.0)
                k_var_low = tl.load(k_var_ptr + key_half + at_k, mask=in_k, other=0.0)
                variance = dot_halves(square, square_low, k_var.T, k_var_low.T, variance)
        inside = (n[:, None] < num_blocks) & (m[None, :] < num_blocks)
        tl.store(row_logits[:, None] + m[None, :], score * scale + log_b, mask=inside)
        if TAIL:
            bias = tail_log_b + tl.minimum(0.5 * scale * scale * variance, cap)
            tl.store(bias_ptr + (head * num_blocks + n[:, None]) * num_blocks + m[None, :], bias, mask=inside)
        if RESPONSE > 0:
            moved = tl.zeros((BLOCK, BLOCK), tl.float32)
            half_responses = half // HEAD_DIM * RESPONSE
            for start in tl.range(0, RESPONSE, CHUNK):
                at_q = (head * num_blocks + n[:, None]) * RESPONSE + start + d[None, :]
                at_k = (key_head * num_blocks + m[:, None]) * RESPONSE + start + d[None, :]
                a = tl.load(q_response_ptr + at_q, mask=n[:, None] < num_blocks, other=0.0)
                a_low = tl.load(q_response_ptr + half_responses + at_q, mask=n[:, None] < num_blocks, other=0.0)
                b = tl.load(kv_response_ptr + at_k, mask=m[:, None] < num_blocks, other=0.0)
                b_low = tl.load(
                    kv_response_ptr + half_responses // group + at_k, mask=m[:, None] < num_blocks, other=0.0
                )
                moved = dot_halves(a, a_low, b.T, b_low.T, moved)
            if VARIANCE:
                moved *= scale * scale * variance
            left = tl.sqrt(tl.maximum(moved, 0.0))
            tl.store(residual_ptr + (head * num_blocks + n[:, None]) * num_blocks + m[None, :], left, mask=inside)
        if GAIN:
            worth = tl.abs(score) > tl.abs(q_error) + tl.abs(k_error)
            tl.store(worth_ptr + (head * num_blocks + n[:, None]) * num_blocks + m[None, :], worth, mask=inside)
    else:
        # the isolated keys: log-sum-exp as the softmax goes, in one column
        # [BLOCK]
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        batch = head // heads
        from_tail = tail_ptr + batch * tail_sb + (head % heads) // group * tail_sh
        for first in tl.range(0, tail, BLOCK):
            t = first + tl.arange(0, BLOCK)
            score = tl.zeros((BLOCK, BLOCK), tl.float32)
            for start in tl.range(0, HEAD_DIM, CHUNK):
                at_q = mean + n[:, None] * HEAD_DIM + start + d[None, :]
                q = tl.load(q_ptr + at_q, mask=n[:, None] < num_blocks, other=0.0)
                q_low = tl.load(q_ptr + half + at_q, mask=n[:, None] < num_blocks, other=0.0)
                at_k = t[:, None].to(tl.int64) * HEAD_DIM + start + d[None, :]
                k = tl.load(from_tail + at_k, mask=t[:, None] < tail, other=0.0).to(tl.float32)
                k_high, k_low = halves(k, q.dtype)
                score = dot_halves(q, q_low, k_high.T, k_low.T, score)
            tail_bias = tl.load(tail_bias_ptr + batch * tail + t, mask=t < tail, other=float("-inf"))
            score = score * scale + tail_bias[None, :]
            new_top = tl.maximum(top, tl.max(score, 1))
            against = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - against) + tl.sum(tl.exp(score - against[:, None]), 1)
            top = new_top
        tl.store(row_logits + num_blocks, top + tl.log(total), mask=n < num_blocks)


@triton.jit
def _compensate_kernel(
    probability_ptr, compensated_ptr, v_ptr, c_ptr, num_blocks, half, group,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, COLUMNS)
    there = d[None, :] < HEAD_DIM
    row = (head * num_blocks + n)[:, None]
    # [BLOCK, COLUMNS]
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in tl.range(0, num_blocks, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        inside = (n[:, None] < num_blocks) & (m[None, :] < num_blocks)
        # [BLOCK, BLOCK_K]
        given = tl.load(compensated_ptr + row * num_blocks + m[None, :], mask=inside, other=0) != 0
        weight = tl.load(probability_ptr + row * (num_blocks + 1) + m[None, :], mask=inside & given, other=0.0)
        # [BLOCK_K, COLUMNS]
        at_v = (head // group * num_blocks + m)[:, None] * HEAD_DIM + d[None, :]
        v = tl.load(v_ptr + at_v, mask=(m[:, None] < num_blocks) & there, other=0.0)
        v_low = tl.load(v_ptr + half // group + at_v, mask=(m[:, None] < num_blocks) & there, other=0.0)
        high, low = halves(weight, v.dtype)
        total = dot_halves(high, low, v, v_low, total)
    tl.store(c_ptr + row * HEAD_DIM + d[None, :], total, mask=(n[:, None] < num_blocks) & there)
