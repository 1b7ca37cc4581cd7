"""Stage 2: the implicit full attention (IPAR), estimated from pooled queries and keys and the isolated keys."""

import math

import torch

from ..config import Rule
from .groups import product
from .pool import stage_dtype


def estimate(
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    k_isolated: torch.Tensor,
    valid: torch.Tensor,
    *,
    rule: Rule,
    scale: float,
    block_size: int,
    leftover: int,
) -> torch.Tensor:
    """P: the attention mass of every query block over the key blocks and, last, over all isolated keys.

    q_mean: [B, H, nb, D]; k_mean: [B, Hk, nb, D]; k_isolated: [B, Hk, I, D], the first `leftover` of them video; valid:
    bool [B, I].
    Returns [B, H, nb, nb + 1], rows of sum 1. With rule.log_b a pooled column stands for block_size tokens. An isolated
    key stands for itself, or, with rule.pooled_text, the leftover ones and every block_size of text make one column.
    """
    columns, present = k_isolated.to(q_mean.dtype), valid
    if rule.pooled_text:
        columns, present = pooled_columns(k_isolated, valid, block_size, leftover)
    to_blocks = product(scale * q_mean, k_mean.transpose(-1, -2))  # [B, H, nb, nb]
    if rule.log_b:
        to_blocks = to_blocks + math.log(block_size)
    to_isolated = product(scale * q_mean, columns.transpose(-1, -2))  # [B, H, nb, columns]
    to_isolated = to_isolated.masked_fill(~present[:, None, None, :], -math.inf)
    probability = torch.cat([to_blocks, to_isolated], dim=-1).softmax(dim=-1)
    num_blocks = to_blocks.shape[-1]
    return torch.cat([probability[..., :num_blocks], probability[..., num_blocks:].sum(-1, keepdim=True)], dim=-1)


def pooled_columns(
    k_isolated: torch.Tensor, valid: torch.Tensor, block_size: int, leftover: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the valid isolated keys: one for the `leftover` first ones, one for every block_size text tokens.

    k_isolated: [B, H, I, D]; valid: bool [B, I]. Returns [B, H, columns, D], and bool [B, columns]: was any key valid?
    """
    columns = [
        _masked_mean(part, part_valid)
        for kind, kind_valid in (
            (k_isolated[:, :, :leftover], valid[:, :leftover]),
            (k_isolated[:, :, leftover:], valid[:, leftover:]),
        )
        for part, part_valid in zip(kind.split(block_size, dim=2), kind_valid.split(block_size, dim=1), strict=True)
        if part.shape[2]
    ]
    if not columns:
        return k_isolated.to(stage_dtype(k_isolated.dtype)), valid
    return torch.stack([mean for mean, _ in columns], dim=2), torch.stack([some for _, some in columns], dim=1)


def _masked_mean(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the valid tokens of x [B, H, n, D] -> [B, H, D], and whether there was one [B]."""
    total = x.to(stage_dtype(x.dtype)).masked_fill(~valid[:, None, :, None], 0).sum(dim=2)
    count = valid.sum(dim=1)
    return total / count.clamp(min=1)[:, None, None], count > 0
