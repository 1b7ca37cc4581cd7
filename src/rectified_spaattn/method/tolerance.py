"""The controller of a tolerance: how many blocks a head keeps next, by what its probe rows measured."""

import math

import torch

LOW = 0.8  # a head keeps fewer blocks only where its error is below this share of what it may be
# gain, and the factors that one step may change by: for the first measurement, and for all others
FIRST, LATER = (1.0, 1 / 4, 4.0), (0.5, 1 / 1.5, 2.0)


def next_top_k(
    top_k: torch.Tensor,
    kept: torch.Tensor,
    error: torch.Tensor,
    *,
    tolerance: float,
    usual: torch.Tensor,
    highest: float,
    first: bool,
) -> torch.Tensor:
    """Blocks a row that every head shall keep at its next call: float [B, H], from 1 to highest.

    top_k: what it should keep at this one; kept: what it kept, blocks a row on average, which is more where top_p or
    neighbours ask for more; error: what its probe rows measured. All float [B, H], none read by the host. usual: mean
    of top_k over all heads, layers and calls of this step: a scalar, or like top_k. highest: most blocks a row. first:
    nothing was measured before, and top_k is a guess.

    The error of a head may be tolerance * sqrt(top_k / usual), so that the mean of the squares over all heads is that
    of the tolerance. With errors that fall as a power of the blocks, heads then share the blocks such that one more
    lowers the sum of squares as much wherever it goes.

    Above that top_k grows by the factor (error / allowed)^gain, below LOW of it it shrinks by (error / (LOW *
    allowed))^gain, between them it stays. Errors fall about as the 0.7th power of the blocks, so a gain of 1 nearly
    corrects a guess at once, and a gain of 0.5 evens out what a few rows measure. Near all blocks the power is several
    times as large, hence small steps down. top_k stays where an error is not finite, and never falls below half of what
    was kept, from where no measured error could raise it soon.
    """
    gain, down, up = FIRST if first else LATER
    off = (error / (tolerance * (top_k / usual).sqrt())).log()
    off = off.clamp(min=0) + (off - math.log(LOW)).clamp(max=0)
    factor = (gain * off).exp().clamp(down, up).where(error.isfinite(), 1.0)
    return (top_k * factor).maximum(kept / 2).clamp(1.0, highest)


def highest_top_k(max_density: float, num_blocks: int) -> float:
    """The most blocks a row that a head may keep, one at least."""
    return max(1.0, max_density * num_blocks)
