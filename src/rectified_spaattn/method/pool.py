"""Stage 1: means of every tiled block, and how its tokens spread around them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import Rule


class Pooled(NamedTuple):
    """Block statistics, each [B, H, nb, D], of keys and values [B, Hk, nb, D]; float32 (float64 for float64 input).

    q, k, v  means
    dq, dk   mean |q - q̄| and mean |k - k̄|, where the gate weighs the gain; else None
    k_var    mean (k - k̄)², for a tail; else None
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    k_var: torch.Tensor | None = None


def pool(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> Pooled:
    """Means of q, k, v over the tokens of every block, and the spread that the rule needs.

    q: [B, H, nb, b, D]; k, v: [B, Hk, nb, b, D]; any floating dtype.
    """
    pooled = Pooled(_block_mean(q), _block_mean(k), _block_mean(v))
    if rule.gate == "gain":
        pooled = pooled._replace(dq=_spread(q, pooled.q, torch.Tensor.abs_), dk=_spread(k, pooled.k, torch.Tensor.abs_))
    if rule.tail:
        pooled = pooled._replace(k_var=_spread(k, pooled.k, torch.Tensor.square_))
    return pooled


def _block_mean(x: torch.Tensor) -> torch.Tensor:
    # [B, H, nb, b, D] -> [B, H, nb, D]
    return x.mean(dim=3, dtype=stage_dtype(x.dtype))


def _spread(x: torch.Tensor, mean: torch.Tensor, distance_: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Mean over every block of distance_(x - mean); distance_ works in place."""
    spread = torch.empty_like(mean)
    apart = mean.new_empty(x[:, 0].shape)  # one head at a time, so that a long video needs no copy of all
    for h in range(x.shape[1]):
        torch.sub(x[:, h], mean[:, h].unsqueeze(2), out=apart)
        spread[:, h] = distance_(apart).mean(dim=2)
    return spread


def stage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which planning is done for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
