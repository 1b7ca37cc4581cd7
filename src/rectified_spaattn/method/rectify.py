"""Stage 5: the factor R and the compensation C of every query block."""

from typing import NamedTuple

import torch

from .groups import product
from .tail import Tail


class Rectification(NamedTuple):
    """out = r * sparse attention + c. r: [B, H, nb]; c: [B, H, nb, D]; float32.

    Where there is a tail, its pooled keys join the sparse attention instead: r is then what the estimate says of it, c
    is empty, and nothing is multiplied. slope: [B, H, D, D], what a query times its tail's share times it gets besides.
    """

    r: torch.Tensor
    c: torch.Tensor
    tail: Tail | None = None
    slope: torch.Tensor | None = None


def rectify(probability: torch.Tensor, compensated: torch.Tensor, v_mean: torch.Tensor) -> Rectification:
    """R_n = 1 - Σ P over compensated blocks, summed from what is left; C_n = Σ P_nm v̄_m over compensated blocks.

    probability: [B, H, nb, nb + 1]; compensated: bool [B, H, nb, nb]; v_mean: [B, Hk, nb, D].
    """
    num_blocks = compensated.shape[-1]
    to_blocks = probability[..., :num_blocks]
    rest = to_blocks.masked_fill(compensated, 0).sum(-1) + probability[..., num_blocks]
    r = rest.masked_fill(~compensated.any(-1), 1.0)  # nothing is compensated: 1, also where an estimate is not finite
    return Rectification(r=r, c=product(to_blocks.masked_fill(~compensated, 0), v_mean))
