"""Stage 3 on a GPU: the critical blocks, as a mask and as packed lists, and R."""

import torch
import triton
import triton.language as tl

from ...method.inputs import Inputs
from ...method.plan import Choices
from ...method.select import head_budget, row_budget, top_k_of
from . import BlockLists

_DIGITS = 4  # of 8 bits, the last of 7: what a float of 0 or more has beside its sign


def select(
    inputs: Inputs, choices: Choices, bias: torch.Tensor | None, lists: BlockLists, residual: torch.Tensor | None = None
) -> None:
    """Turns logits into probability in place, fills block_mask (unless the inputs bring it), compensated (which holds
    what `scores` found worthwhile), r and the lists; for a tail makes bias -inf for blocks that do not join it.
    residual: what `scores` gave, to choose by in place of top-k by probability; comes out times P where means told it,
    +inf for the first largest of every row.
    """
    batch, heads, nb, _ = choices.probability.shape
    config, blocks = inputs.config, inputs.blocks
    width, least = triton.next_power_of_2(nb + 1), top_k_of(config, nb)
    counts = None
    budget, budgets, top_k = least * nb, None, None
    if inputs.top_k is not None:
        top_k, budgets = row_budget(inputs.top_k, nb).int(), head_budget(inputs.top_k, nb)
    if residual is not None:
        counts = torch.zeros(_DIGITS, batch * heads, 256, dtype=torch.int32, device=residual.device)
        grid, options = (nb, batch * heads), {"WIDTH": width, "num_warps": _warps_of(width)}
        logits = None if config.rule.queries else choices.probability
        _leaders_kernel[grid](logits, residual, counts, nb, **options)
        for known in range(1, _DIGITS):
            _narrow_kernel[grid](residual, counts, budgets, nb, budget, KNOWN=known, **options)
    _select_kernel[(lists.counts.shape[2], batch * heads)](
        choices.probability, choices.block_mask, choices.compensated, choices.r, bias, lists.counts, lists.indices,
        blocks.neighbours, blocks.first_frame, residual, counts, budgets, top_k,
        blocks.idle, nb, least, budget, config.top_p,
        WIDTH=width, GIVEN=inputs.block_mask is not None, TOP_P=config.top_p > 0,
        NEIGHBOURS=config.neighbours, FIRST_FRAME=config.first_frame,
        COMPENSATE=config.rule.gate != "none", GAIN=config.rule.gate == "gain", TAIL=config.rule.tail,
        RESIDUAL=residual is not None, IDLE=blocks.idle is not None, num_warps=_warps_of(width),
    )  # fmt: skip


def longest_first(counts: torch.Tensor) -> torch.Tensor:
    """int32, like counts int32 [B, H, n]: the places of the largest first, of equal ones in their order."""
    batch, heads, rows = counts.shape
    turns = torch.empty_like(counts)
    _turns_kernel[(triton.cdiv(rows, 64), batch * heads)](counts, turns, rows, BLOCK=64, num_warps=4)
    return turns


def _warps_of(width: int) -> int:
    """Of a program that holds a row of so many blocks."""
    return min(max(width // 512, 1), 16)


@triton.jit
def _count(count_ptr, bits, wanted, KNOWN: tl.constexpr):
    """Adds to the 256 counts of a head by the digit behind the KNOWN first ones, but not to the first count."""
    digit = (bits >> (23 - 8 * KNOWN)) & 255 if KNOWN < 3 else bits & 127
    count = tl.histogram(tl.where(wanted, digit, 0), 256)
    place = tl.arange(0, 256)
    to = count_ptr + (KNOWN * tl.num_programs(1) + tl.program_id(1)) * 256 + place
    tl.atomic_add(to, count, mask=(place > 0) & (count > 0), sem="relaxed")


@triton.jit
def _first_digits(count_ptr, budget, KNOWN: tl.constexpr):
    """The KNOWN first digits of the (budget + 1)-th largest number of a head; as bits, from the lowest on."""
    place = tl.arange(0, 256)
    digits = 0
    for level in tl.static_range(KNOWN):
        # [256]
        count = tl.load(count_ptr + (level * tl.num_programs(1) + tl.program_id(1)) * 256 + place)
        above = tl.sum(count, 0) - tl.cumsum(count, 0)  # numbers of larger digits
        digit = tl.sum((above > budget).to(tl.int32), 0)
        budget -= tl.sum(tl.where(place == digit, above, 0), 0)
        digits = digits * (256 if level < 3 else 128) + digit
    return digits


@triton.jit
def _leaders_kernel(logits_ptr, residual_ptr, count_ptr, num_blocks, WIDTH: tl.constexpr):
    """Multiplies a row of residuals by the probabilities of its logits, if there are any; +inf in place of the first
    largest, 0 in place of NaN. Counts their first digits.
    """
    row = tl.program_id(1).to(tl.int64) * num_blocks + tl.program_id(0)
    # [WIDTH]
    m = tl.arange(0, WIDTH)
    left = tl.load(residual_ptr + row * num_blocks + m, mask=m < num_blocks, other=0.0)
    if logits_ptr is not None:
        logits = tl.load(logits_ptr + row * (num_blocks + 1) + m, mask=m <= num_blocks, other=float("-inf"))
        weight = tl.exp(logits - tl.max(logits, 0))
        left = left * weight / tl.sum(weight, 0)
    left = tl.where(left == left, tl.minimum(left, 3e38), 0.0)
    first = tl.argmax(tl.where(m < num_blocks, left, -1.0), 0)
    left = tl.where(m == first, float("inf"), left)
    tl.store(residual_ptr + row * num_blocks + m, left, mask=m < num_blocks)
    _count(count_ptr, left.to(tl.int32, bitcast=True), m < num_blocks, 0)


@triton.jit
def _narrow_kernel(
    score_ptr, count_ptr, budget_ptr, num_blocks, budget, KNOWN: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of a row of scores that begin as the (budget + 1)-th largest of the head counts the next digits."""
    if budget_ptr is not None:
        budget = tl.load(budget_ptr + tl.program_id(1)).to(tl.int32)
    row = tl.program_id(1).to(tl.int64) * num_blocks + tl.program_id(0)
    # [WIDTH]
    m = tl.arange(0, WIDTH)
    bits = tl.load(score_ptr + row * num_blocks + m, mask=m < num_blocks, other=0.0).to(tl.int32, bitcast=True)
    alike = bits >> (31 - 8 * KNOWN) == _first_digits(count_ptr, budget, KNOWN)
    _count(count_ptr, bits, alike & (m < num_blocks), KNOWN)


@triton.jit
def _select_kernel(
    logits_ptr, critical_ptr, compensated_ptr, r_ptr, bias_ptr, count_ptr, index_ptr,
    neighbours_ptr, first_frame_ptr, residual_ptr, digits_ptr, budget_ptr, top_k_ptr, idle_ptr,
    num_blocks, least, budget, top_p,
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
        top_k = least
        if top_k_ptr is not None:
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
            if budget_ptr is not None:
                budget = tl.load(budget_ptr + head).to(tl.int32)
            left = tl.load(residual_ptr + row * num_blocks + m, mask=inside, other=0.0).to(tl.int32, bitcast=True)
            keep = (left > _first_digits(digits_ptr, budget, 4)) | (budget >= num_blocks * num_blocks)
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
def _turns_kernel(count_ptr, turn_ptr, rows, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    own = tl.load(count_ptr + head * rows + i, mask=i < rows, other=0)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, rows, BLOCK):
        j = first + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + head * rows + j, mask=j < rows, other=-1)
        # [BLOCK, BLOCK]
        sooner = (count[None, :] > own[:, None]) | ((count[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
        before += tl.sum(sooner.to(tl.int32), 1)
    tl.store(turn_ptr + head * rows + before, i, mask=i < rows)
