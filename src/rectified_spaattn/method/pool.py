"""Stage 1: means of every tiled block, and how its tokens spread around them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import Rectify


class Pooled(NamedTuple):
    """Block statistics, each [B, H, nb, D], float32 (float64 for float64 input).

    q, k, v  means
    dq, dk   mean |q - q̄| and mean |k - k̄|, for GAPR; None where they are not asked for
    k_var    mean (k - k̄)², for "row"; None where it is not asked for
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    k_var: torch.Tensor | None = None


def pool(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rectify: Rectify = "ipar+gapr") -> Pooled:
    """Means of q, k, v over the tokens of every block, and the spread that `rectify` needs.

    q, k, v: [B, H, nb, b, D], any floating dtype.
    """
    means = Pooled(_block_mean(q), _block_mean(k), _block_mean(v))
    if rectify == "ipar+gapr":
        return means._replace(dq=_spread(q, means.q, torch.Tensor.abs_), dk=_spread(k, means.k, torch.Tensor.abs_))
    if rectify == "row":
        return means._replace(k_var=_spread(k, means.k, torch.Tensor.square_))
    return means


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
