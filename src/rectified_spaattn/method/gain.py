"""Stage 4: which dropped blocks are worth their pooled contribution (GAPR)."""

import torch

from ..config import Rule
from .groups import product
from .pool import Pooled


def gain(pooled: Pooled, block_mask: torch.Tensor, rule: Rule) -> torch.Tensor:
    """bool [B, H, nb, nb]: the dropped blocks that are compensated. block_mask: bool, same shape, the critical blocks.

    The gate "gain" compensates where |q̄·k̄| > |δq·k̄| + |q̄·δk| (unscaled logits), "none" nowhere, "all" everywhere.
    """
    if rule.gate == "none":
        return torch.zeros_like(block_mask)
    if rule.gate == "all":
        return ~block_mask
    if pooled.dq is None or pooled.dk is None:
        raise ValueError("gain: got block statistics without deviations; pool with the same rule.")
    k_t, dk_t = pooled.k.transpose(-1, -2), pooled.dk.transpose(-1, -2)
    worth = product(pooled.q, k_t).abs_()  # [B, H, nb, nb]
    error = product(pooled.dq, k_t).abs_() + product(pooled.q, dk_t).abs_()
    return ~block_mask & (worth > error)
