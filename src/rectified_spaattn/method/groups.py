"""Grouped-query attention: key heads that several query heads, one after the other, share."""

import torch


def product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k, [B, H, n, m], without a copy of k. q: [B, H, n, c], contiguous; k: [B, Hk, c, m]."""
    _, heads, rows, _ = q.shape
    sharing = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hk, H / Hk * n, c]
    return (sharing @ k).unflatten(2, (heads // k.shape[1], rows)).flatten(1, 2)
