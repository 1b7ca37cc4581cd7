"""Stages 1 to 5 in a row: everything about a call that is decided before a single token attends."""

from typing import NamedTuple

import torch

from .estimate import estimate
from .gain import gain
from .inputs import Inputs
from .pool import pool
from .rectify import Rectification, rectify
from .select import select
from .tail import pooled_keys


class Choices(NamedTuple):
    """What a call decided.

    block_mask   bool [B, H, nb, nb], the critical blocks
    compensated  bool [B, H, nb, nb], the dropped blocks that are compensated
    probability  [B, H, nb, nb + 1], the estimated full attention; the last column is all isolated tokens
    r            [B, H, nb], the full-attention mass that is not compensated
    """

    block_mask: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor


def decide(
    inputs: Inputs, q_tiled: torch.Tensor, k_tiled: torch.Tensor, v_tiled: torch.Tensor, k_isolated: torch.Tensor
) -> tuple[Choices, Rectification]:
    """q_tiled, k_tiled, v_tiled: [B, H, nb, b, D]; k_isolated: [B, H, I, D]: the inputs' tokens, block after block."""
    blocks, rule = inputs.blocks, inputs.config.rule
    pooled = pool(q_tiled, k_tiled, v_tiled, rule)
    probability = estimate(
        pooled.q,
        pooled.k,
        k_isolated,
        inputs.valid,
        rule=rule,
        scale=inputs.scale,
        block_size=blocks.block_size,
        leftover=blocks.leftover,
    )
    critical = select(probability, blocks, inputs.config) if inputs.block_mask is None else inputs.block_mask
    compensated = gain(pooled, critical, rule)
    rectification = rectify(probability, compensated, pooled.v)
    if rule.tail:
        rectification = rectification._replace(
            c=torch.zeros_like(rectification.c),
            tail=pooled_keys(pooled, compensated, inputs.scale, blocks.block_size),
        )
    return Choices(critical, compensated, probability, rectification.r), rectification
