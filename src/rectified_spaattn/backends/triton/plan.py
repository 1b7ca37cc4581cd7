"""Stages 2 to 5 on a GPU: the implicit full attention, the critical blocks as packed lists, gain, R and C."""

import math

import torch
import triton
import triton.language as tl

from ...method.estimate import pooled_columns
from ...method.inputs import Inputs
from ...method.plan import Choices
from ...method.rectify import Rectification
from ...method.select import edge, head_budget, row_budget, top_k_of
from ...method.tail import CAP, Tail
from . import BlockLists, columns_of
from .slope import slope
from .tile import Tiled


def decide(inputs: Inputs, tiled: Tiled) -> tuple[Choices, Rectification, BlockLists]:
    """Stages 2 to 5. Nothing here waits for the device."""
    nb, rule = inputs.blocks.num_blocks, inputs.config.rule
    choices, bias, lists = empty(inputs, tiled)
    per_block = tiled.pooled.q.shape[1:]
    stored = () if rule.tail else per_block  # with a tail there is no C: its zeros take the memory of one
    c = torch.zeros(stored, dtype=torch.float32, device=tiled.q.device).expand(per_block)
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
        tail = Tail(tiled.k_pool, tiled.v_pool, bias)
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
    key adds to its logit. Where blocks are chosen by error gives their residuals, float32 [B, H, nb, nb], +inf for the
    first largest of every row.
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
        RESPONSE=rank * rank, num_warps=4, num_stages=2,  # with three Triton 3.6 gets the gain of heads of 96 wrong
    )  # fmt: skip
    if residual is not None:
        width = triton.next_power_of_2(nb + 1)
        _leaders_kernel[(nb, batch * heads)](choices.probability, residual, nb, WIDTH=width, num_warps=_warps_of(width))
    return residual


def select(
    inputs: Inputs, choices: Choices, bias: torch.Tensor | None, lists: BlockLists, residual: torch.Tensor | None = None
) -> None:
    """Turns logits into probability in place, fills block_mask (unless the inputs bring it), compensated (which holds
    what `scores` found worthwhile), r and the lists; for a tail makes bias -inf for blocks that do not join it.
    residual: what `scores` gave, to choose by in place of top-k by probability.
    """
    batch, heads, nb, _ = choices.probability.shape
    config, blocks = inputs.config, inputs.blocks
    width, least = triton.next_power_of_2(nb + 1), top_k_of(config, nb)
    if inputs.top_k is None:
        top_k = torch.full((batch, heads), least, dtype=torch.int32, device=choices.r.device)
        edges = None if residual is None else edge(residual, least * nb)
    else:
        top_k = row_budget(inputs.top_k, nb).int()
        edges = None if residual is None else edge(residual, head_budget(inputs.top_k, nb))
    _select_kernel[(lists.counts.shape[2], batch * heads)](
        choices.probability, choices.block_mask, choices.compensated, choices.r, bias, lists.counts, lists.indices,
        blocks.neighbours, blocks.first_frame, residual, edges, top_k,
        blocks.idle, nb, config.top_p,
        WIDTH=width, GIVEN=inputs.block_mask is not None, TOP_P=config.top_p > 0,
        NEIGHBOURS=config.neighbours, FIRST_FRAME=config.first_frame,
        COMPENSATE=config.rule.gate != "none", GAIN=config.rule.gate == "gain", TAIL=config.rule.tail,
        RESIDUAL=residual is not None, IDLE=blocks.idle is not None, num_warps=_warps_of(width),
    )  # fmt: skip


def _warps_of(width: int) -> int:
    """Of a program that holds a row of so many blocks."""
    return min(max(width // 512, 1), 16)


def compensate(choices: Choices, v_mean: torch.Tensor, c: torch.Tensor) -> None:
    """Fills c [B, H, nb, D]: the sum of P_nm v̄_m over compensated blocks m. v_mean: [2, B, Hk, nb, D] as in Tiled."""
    (batch, heads, nb, _), (*_, key_heads, _, head_dim) = choices.probability.shape, v_mean.shape
    _compensate_kernel[(triton.cdiv(nb, 64), batch * heads)](
        choices.probability, choices.compensated, v_mean, c, nb, c.numel(), heads // key_heads,
        HEAD_DIM=head_dim, COLUMNS=columns_of(head_dim), BLOCK=64, BLOCK_K=16, num_warps=4,
    )  # fmt: skip


@triton.jit
def _dot(a, a_low, b, b_low, acc):
    """acc + (a + a_low) @ (b + b_low), without the product of the two low halves, which is below float32's rounding."""
    acc = tl.dot(a_low, b, acc, input_precision="ieee")
    acc = tl.dot(a, b_low, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _scores_kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, k_var_ptr, tail_ptr, tail_bias_ptr, logits_ptr, worth_ptr, bias_ptr,
    q_response_ptr, kv_response_ptr, residual_ptr,
    tail_sb, tail_sh, tail,
    heads, group, num_blocks, half, scale, log_b, tail_log_b, cap,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GAIN: tl.constexpr, TAIL: tl.constexpr,
    RESPONSE: tl.constexpr,
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
            score = _dot(q, q_low, k.T, k_low.T, score)
            if GAIN:
                dq = tl.load(dq_ptr + at_q, mask=in_q, other=0.0)
                dq_low = tl.load(dq_ptr + half + at_q, mask=in_q, other=0.0)
                q_error = _dot(dq, dq_low, k.T, k_low.T, q_error)
                dk = tl.load(dk_ptr + at_k, mask=in_k, other=0.0)
                dk_low = tl.load(dk_ptr + key_half + at_k, mask=in_k, other=0.0)
                k_error = _dot(q, q_low, dk.T, dk_low.T, k_error)
            if TAIL:
                wide = q.to(tl.float32) + q_low.to(tl.float32)
                square = (wide * wide).to(q.dtype)
                square_low = (wide * wide - square.to(tl.float32)).to(q.dtype)
                k_var = tl.load(k_var_ptr + at_k, mask=in_k, other=0.0)
                k_var_low = tl.load(k_var_ptr + key_half + at_k, mask=in_k, other=0.0)
                variance = _dot(square, square_low, k_var.T, k_var_low.T, variance)
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
                moved = _dot(a, a_low, b.T, b_low.T, moved)
            left = tl.sqrt(tl.maximum(scale * scale * variance * moved, 0.0))
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
                k_high = k.to(q.dtype)
                k_low = (k - k_high.to(tl.float32)).to(q.dtype)
                score = _dot(q, q_low, k_high.T, k_low.T, score)
            tail_bias = tl.load(tail_bias_ptr + batch * tail + t, mask=t < tail, other=float("-inf"))
            score = score * scale + tail_bias[None, :]
            new_top = tl.maximum(top, tl.max(score, 1))
            against = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - against) + tl.sum(tl.exp(score - against[:, None]), 1)
            top = new_top
        tl.store(row_logits + num_blocks, top + tl.log(total), mask=n < num_blocks)


@triton.jit
def _leaders_kernel(logits_ptr, residual_ptr, num_blocks, WIDTH: tl.constexpr):
    """Multiplies a row of residuals by its probabilities; +inf in place of the first largest, 0 in place of NaN."""
    row = tl.program_id(1).to(tl.int64) * num_blocks + tl.program_id(0)
    # [WIDTH]
    m = tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + row * (num_blocks + 1) + m, mask=m <= num_blocks, other=float("-inf"))
    weight = tl.exp(logits - tl.max(logits, 0))
    left = tl.load(residual_ptr + row * num_blocks + m, mask=m < num_blocks, other=0.0) * weight / tl.sum(weight, 0)
    left = tl.where(left == left, tl.minimum(left, 3e38), 0.0)
    first = tl.argmax(tl.where(m < num_blocks, left, -1.0), 0)
    tl.store(residual_ptr + row * num_blocks + m, tl.where(m == first, float("inf"), left), mask=m < num_blocks)


@triton.jit
def _select_kernel(
    logits_ptr, critical_ptr, compensated_ptr, r_ptr, bias_ptr, count_ptr, index_ptr,
    neighbours_ptr, first_frame_ptr, residual_ptr, residual_edge_ptr, top_k_ptr, idle_ptr,
    num_blocks, top_p,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, TOP_P: tl.constexpr,
    NEIGHBOURS: tl.constexpr, FIRST_FRAME: tl.constexpr,
    COMPENSATE: tl.constexpr, GAIN: tl.constexpr, TAIL: tl.constexpr, RESIDUAL: tl.constexpr, IDLE: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # [WIDTH]
    m = tl.arange(0, WIDTH)
    inside = m < num_blocks
    listed = head * tl.num_programs(0) + n
    if n >= num_blocks:
        count = num_blocks
        if IDLE:
            count = tl.where(tl.load(idle_ptr + n) != 0, 0, num_blocks)
        tl.store(count_ptr + listed, count)
        tl.store(index_ptr + listed * num_blocks + m, m, mask=inside)
        return
    row = head * num_blocks + n
    logits = tl.load(logits_ptr + row * (num_blocks + 1) + m, mask=m <= num_blocks, other=float("-inf"))
    weight = tl.exp(logits - tl.max(logits, 0))
    probability = weight / tl.sum(weight, 0)
    tl.store(logits_ptr + row * (num_blocks + 1) + m, probability, mask=m <= num_blocks)
    isolated = tl.sum(tl.where(m == num_blocks, probability, 0.0), 0)
    probability = tl.where(inside, probability, 0.0)

    if GIVEN:
        keep = tl.load(critical_ptr + row * num_blocks + m, mask=inside, other=0) != 0
    else:
        # The bits of a float >= 0 are ordered as the float is: two thresholds, built from the highest bit down.
        # kth: the top_k-th largest probability; edge: the smallest one above which blocks hold less than top_p.
        bits = tl.where(inside, probability.to(tl.int32, bitcast=True), -1)
        top_k = tl.load(top_k_ptr + head)
        kth = 0
        edge = 0
        for place in tl.static_range(15):
            step = 1 << (28 - 2 * place)  # two bits a turn: the three sums do not wait for each other
            if not RESIDUAL:
                one = tl.sum((bits >= kth + step).to(tl.int32), 0) >= top_k
                two = tl.sum((bits >= kth + 2 * step).to(tl.int32), 0) >= top_k
                three = tl.sum((bits >= kth + 3 * step).to(tl.int32), 0) >= top_k
                kth += step * (one.to(tl.int32) + two.to(tl.int32) + three.to(tl.int32))
            if TOP_P:
                one = isolated + tl.sum(tl.where(bits >= edge + step, probability, 0.0), 0) >= top_p
                two = isolated + tl.sum(tl.where(bits >= edge + 2 * step, probability, 0.0), 0) >= top_p
                three = isolated + tl.sum(tl.where(bits >= edge + 3 * step, probability, 0.0), 0) >= top_p
                edge += step * (one.to(tl.int32) + two.to(tl.int32) + three.to(tl.int32))
        if RESIDUAL:
            left = tl.load(residual_ptr + row * num_blocks + m, mask=inside, other=float("-inf"))
            keep = left > tl.load(residual_edge_ptr + head)
        else:
            # of equal probabilities the lower index goes first
            ties = (bits == kth).to(tl.int32)
            wanted = top_k - tl.sum((bits > kth).to(tl.int32), 0)
            keep = (bits > kth) | ((ties != 0) & (tl.cumsum(ties, 0) <= wanted))
        if TOP_P:
            ties = (bits == edge).to(tl.int32)
            above = isolated + tl.sum(tl.where(bits > edge, probability, 0.0), 0)
            reached = above + (tl.cumsum(ties, 0) - 1).to(tl.float32) * probability
            keep |= (bits > edge) | ((ties != 0) & (reached < top_p))
        if NEIGHBOURS:
            keep |= tl.load(neighbours_ptr + n.to(tl.int64) * num_blocks + m, mask=inside, other=0) != 0
        if FIRST_FRAME:
            mine = tl.load(first_frame_ptr + n) != 0
            keep |= (tl.load(first_frame_ptr + m, mask=inside, other=0) != 0) & mine
        keep |= probability != probability  # NaN: full attention for this block
        tl.store(critical_ptr + row * num_blocks + m, keep, mask=inside)

    if GAIN:
        compensated = (tl.load(compensated_ptr + row * num_blocks + m, mask=inside, other=0) != 0) & ~keep
    elif COMPENSATE:
        compensated = inside & ~keep
    else:
        compensated = inside & ~inside
    tl.store(compensated_ptr + row * num_blocks + m, compensated, mask=inside)
    some = tl.sum(compensated.to(tl.int32), 0) > 0
    tl.store(r_ptr + row, tl.where(some, isolated + tl.sum(tl.where(compensated, 0.0, probability), 0), 1.0))
    kept = (keep & inside).to(tl.int32)
    if TAIL:
        tl.store(bias_ptr + row * num_blocks + m, float("-inf"), mask=inside & (compensated == 0))
    tl.store(count_ptr + listed, tl.sum(kept, 0))
    tl.store(index_ptr + listed * num_blocks + tl.cumsum(kept, 0) - 1, m, mask=kept != 0)


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
        high = weight.to(v.dtype)
        low = (weight - high.to(tl.float32)).to(v.dtype)
        total = _dot(high, low, v, v_low, total)
    tl.store(c_ptr + row * HEAD_DIM + d[None, :], total, mask=(n[:, None] < num_blocks) & there)
