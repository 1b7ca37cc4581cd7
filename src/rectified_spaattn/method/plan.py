"""Stages 1 to 5 in a row: everything about a call that is decided before a single token attends."""

from typing import NamedTuple

import torch

from .estimate import estimate
from .gain import gain
from .inputs import Inputs
from .pool import pool
from .rectify import Rectification, rectify
from .residual import directions, residual, responses, told_by_means, told_by_queries
from .select import select
from .slope import slope
from .tail import half_variance, pooled_keys


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
    """q_tiled: [B, H, nb, b, D]; k_tiled, v_tiled: [B, Hk, nb, b, D]; k_isolated: [B, Hk, I, D]: the inputs' tokens,
    block after block.
    """
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
    spread = half_variance(pooled, inputs.scale) if rule.tail and not rule.queries else None
    critical = inputs.block_mask
    if critical is None:
        left = None
        if rule.choice == "error" and blocks.num_blocks:
            seen = directions(inputs.q, inputs.k, blocks.tiled, inputs.scale)
            told = (
                told_by_queries(q_tiled, pooled, k_isolated, inputs.valid, inputs.scale)
                if spread is None
                else told_by_means(probability, spread)
            )
            left = residual(told, responses(q_tiled, k_tiled, v_tiled, seen))
        critical = select(probability, blocks, inputs.config, left, inputs.top_k)
    compensated = gain(pooled, critical, rule)
    rectification = rectify(probability, compensated, pooled.v)
    if rule.tail:
        rectification = rectification._replace(
            c=rectification.c.new_empty(0), tail=pooled_keys(pooled, compensated, spread, blocks.block_size)
        )
        if rule.slope:
            follow = slope(probability, spread, compensated, k_tiled, v_tiled, pooled, inputs.scale)
            rectification = rectification._replace(slope=follow)
    return Choices(critical, compensated, probability, rectification.r), rectification
