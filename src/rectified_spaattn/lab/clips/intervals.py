"""95% confidence intervals of means over prompt-seed pairs: bootstrap over the pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the 2.5% and 97.5% quantiles of the means of resampled pairs; NaN quantiles for a single pair.

    Infinite values, the PSNR of identical clips: an infinite mean, and infinite quantiles where all are, else NaN.
    """

    mean: float
    low: float
    high: float

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
        return Interval(mean=mean, low=mean, high=mean)
    if len(values) == 1 or not data.isfinite().all():
        return Interval(mean=mean, low=torch.nan, high=torch.nan)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = data[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=mean, low=low, high=high)
