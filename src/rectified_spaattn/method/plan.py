"""Stages 1 to 5 in a row: everything about a call that is decided before a single token attends."""

from typing import NamedTuple

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from .estimate import estimate, estimate_pooled
from .gain import gain
from .pool import pool
from .rectify import rectify
from .select import select
from .tail import tail_bias


class Tail(NamedTuple):
    """Pooled keys and values [B, H, nb, D] of "row", and what is added to their logits: bias [B, H, nb, nb]."""

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor


class Plan(NamedTuple):
    """block_mask, compensated: bool [B, H, nb, nb]; probability: [B, H, nb, nb + 1]; r: [B, H, nb]; c: [B, H, nb, D].

    tail is there for "row" alone and takes the place of r and c: r is then what the estimate says of it, c zeros.
    """

    block_mask: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor
    c: torch.Tensor
    tail: Tail | None = None


def make_plan(
    q_tiled: torch.Tensor,
    k_tiled: torch.Tensor,
    v_tiled: torch.Tensor,
    k_isolated: torch.Tensor,
    valid: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    scale: float,
    block_mask: torch.Tensor | None = None,
) -> Plan:
    """q_tiled, k_tiled, v_tiled: [B, H, nb, b, D]; k_isolated: [B, H, I, D]; valid: bool [B, I]; block_mask: bool
    [B, H, nb, nb] takes the place of stage 3.
    """
    pooled = pool(q_tiled, k_tiled, v_tiled, config.rectify)
    keys = (pooled.q, pooled.k, k_isolated, valid)
    if config.rectify == "pooled":
        probability = estimate_pooled(*keys, scale=scale, block_size=layout.block_size, leftover=layout.leftover)
    else:
        probability = estimate(*keys, scale=scale, block_size=layout.block_size)
    critical = select(probability, layout, config) if block_mask is None else block_mask
    compensated = gain(pooled, critical, config.rectify)
    r, c = rectify(probability, compensated, pooled.v)
    if config.rectify != "row":
        return Plan(critical, compensated, probability, r, c)
    tail = Tail(pooled.k, pooled.v, tail_bias(pooled, compensated, scale, layout.block_size))
    return Plan(critical, compensated, probability, r, torch.zeros_like(c), tail)
