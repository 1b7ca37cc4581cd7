"""Stage 2: the implicit full attention (IPAR), estimated from pooled queries and keys and exact isolated keys."""

import math

import torch

from .pool import stage_dtype


def estimate(
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    k_isolated: torch.Tensor,
    valid: torch.Tensor,
    *,
    scale: float,
    block_size: int,
) -> torch.Tensor:
    """P of IPAR: the attention mass of every query block over the key blocks and, last, over all isolated keys.

    q_mean, k_mean: [B, H, nb, D]; k_isolated: [B, H, I, D]; valid: bool [B, I]. Returns [B, H, nb, nb + 1], rows of
    sum 1. A pooled column stands for block_size tokens, hence its + log b; an isolated key stands for itself.
    """
    to_blocks = scale * q_mean @ k_mean.transpose(-1, -2) + math.log(block_size)  # [B, H, nb, nb]
    to_isolated = scale * q_mean @ k_isolated.to(q_mean.dtype).transpose(-1, -2)  # [B, H, nb, I]
    return _softmax_with_sum(to_blocks, to_isolated.masked_fill(~valid[:, None, None, :], -math.inf))


def estimate_pooled(
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    k_isolated: torch.Tensor,
    valid: torch.Tensor,
    *,
    scale: float,
    block_size: int,
    leftover: int,
) -> torch.Tensor:
    """P of the "pooled" ablation: isolated keys are pooled like video, and no column counts the tokens it stands for.

    The `leftover` video tokens make one pooled column, the valid text tokens one column per block_size of them.
    Shapes as in `estimate`.
    """
    to_blocks = scale * q_mean @ k_mean.transpose(-1, -2)  # [B, H, nb, nb]
    columns, present = pooled_columns(k_isolated, valid, block_size, leftover)
    to_isolated = scale * q_mean @ columns.transpose(-1, -2)
    return _softmax_with_sum(to_blocks, to_isolated.masked_fill(~present[:, None, None, :], -math.inf))


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


def _softmax_with_sum(to_blocks: torch.Tensor, to_isolated: torch.Tensor) -> torch.Tensor:
    """Softmax over both kinds of columns, with all isolated ones summed into one."""
    probability = torch.cat([to_blocks, to_isolated], dim=-1).softmax(dim=-1)
    num_blocks = to_blocks.shape[-1]
    return torch.cat([probability[..., :num_blocks], probability[..., num_blocks:].sum(-1, keepdim=True)], dim=-1)
