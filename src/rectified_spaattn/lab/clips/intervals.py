"""95% confidence intervals of means over prompt-seed pairs: bootstrap over the pairs, and Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the 2.5% and 97.5% quantiles of the means of resampled pairs; NaN quantiles for a single pair.

    t_low, t_high: the interval of Student's t, as if the values were normal; NaN likewise.
    Infinite values, the PSNR of identical clips: an infinite mean, and infinite ends where all are, else NaN.
    """

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float

    def text(self, digits: int, sign: str = "") -> str:
        """ "mean [low, high]", the mean alone where there is no interval. sign: "+" writes it out."""
        form = f"{sign}.{digits}f"
        ends = "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.mean:{form}}{ends}"


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """The mean of one value a pair, with its percentile bootstrap interval.

    The same resamples for every call with as many values, so give differences of pairs to compare two modes.
    Raises ValueError for no value.
    """
    if not values:
        raise ValueError("bootstrap: got no values; allowed: one or more.")
    data = torch.tensor(values, dtype=torch.float64)
    mean = data.mean().item()
    if data.isinf().all():
        return Interval(mean=mean, low=mean, high=mean, t_low=mean, t_high=mean)
    if len(values) == 1 or not data.isfinite().all():
        return Interval(mean=mean, low=math.nan, high=math.nan, t_low=math.nan, t_high=math.nan)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = data[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    half = t_quantile(len(values) - 1) * data.std().item() / math.sqrt(len(values))
    return Interval(mean=mean, low=low, high=high, t_low=mean - half, t_high=mean + half)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t within which, on both sides of 0, `share` of Student's distribution lies; freedom: 1 or more.

    By bisection of the finite sums that the distribution has where the degrees of freedom are whole (Abramowitz and
    Stegun, 26.7.3 and 26.7.4), as neither torch nor the standard library has the quantile.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < share else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The share of Student's distribution within t = sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
