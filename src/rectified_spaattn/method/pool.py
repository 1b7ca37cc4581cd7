"""Stage 1: one mean and one mean absolute deviation per tiled block (design: pooling; GAPR's δ)."""

from typing import NamedTuple

import torch


class Pooled(NamedTuple):
    """Block statistics, each [B, H, nb, D], float32 (float64 for float64 input)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor


def pool(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pooled:
    """Means of q, k, v and mean |q - q̄|, |k - k̄| over the tokens of every block.

    q, k, v: [B, H, nb, b, D], any floating dtype.
    """
    q_mean, q_deviation = _mean_and_deviation(q)
    k_mean, k_deviation = _mean_and_deviation(k)
    return Pooled(q=q_mean, k=k_mean, v=_block_mean(v), dq=q_deviation, dk=k_deviation)


def _block_mean(x: torch.Tensor) -> torch.Tensor:
    # [B, H, nb, b, D] -> [B, H, nb, D]
    return x.mean(dim=3, dtype=stage_dtype(x.dtype))


def _mean_and_deviation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = _block_mean(x)
    deviation = torch.empty_like(mean)
    distance = mean.new_empty(x[:, 0].shape)  # one head at a time, so that a long video needs no copy of all
    for h in range(x.shape[1]):
        torch.sub(x[:, h], mean[:, h].unsqueeze(2), out=distance)
        deviation[:, h] = distance.abs_().mean(dim=2)
    return mean, deviation


def stage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which planning is done for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
