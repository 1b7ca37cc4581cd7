"""Stage 1: one mean and one mean absolute deviation per tiled block (design: pooling; GAPR's δ)."""

from typing import NamedTuple

import torch

# Deviations need a copy of the block they describe; this bounds it to 64 Mi elements at a time.
_CHUNK_ELEMENTS = 1 << 26


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
    heads = max(1, _CHUNK_ELEMENTS * x.shape[1] // max(1, x.numel()))
    for h in range(0, x.shape[1], heads):
        part = slice(h, h + heads)
        deviation[:, part] = (x[:, part] - mean[:, part].unsqueeze(3)).abs_().mean(dim=3)
    return mean, deviation


def stage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which planning is done for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
