"""Stage 5 where the rule has a tail: compensated blocks as pooled keys. Not in the paper."""

import math
from typing import NamedTuple

import torch

from .groups import product
from .pool import Pooled

CAP = 2.0  # largest ½σ²; studies/NOTEBOOK.md has the measurement


class Tail(NamedTuple):
    """Pooled keys and values [B, Hk, nb, D], and what is added to their logits: bias [B, H, nb, nb].

    k_var: [B, Hk, nb, D], where every query adds min(½σ², CAP) of its own, ½σ² = ½ Σ_d (scale * q_d)² * k_var_d
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    k_var: torch.Tensor | None = None


def half_variance(pooled: Pooled, scale: float) -> torch.Tensor:
    """½σ²_nm, [B, H, nb, nb], by the mean query and a diagonal covariance: σ²_nm = scale² Σ_d q̄²_nd Var_m,d is the
    variance of scale * q·k in block m.
    """
    if pooled.k_var is None:
        raise ValueError("half_variance: got block statistics without the variance of keys; pool with the same rule.")
    return product((0.5 * scale**2) * pooled.q.square(), pooled.k_var.transpose(-1, -2))


def pooled_keys(pooled: Pooled, compensated: torch.Tensor, half_variance: torch.Tensor | None, block_size: int) -> Tail:
    """The bias is log b + min(½σ²_nm, CAP) for compensated blocks m of query block n, -inf for the others; without
    half_variance it is log b, and every query adds its own.

    The b keys of a block give a query the mass Σ exp(scale * q·k) = b * exp(scale * q·k̄ + ½σ² + ...).
    """
    added = pooled.q.new_zeros(compensated.shape) if half_variance is None else half_variance.clamp(max=CAP)
    bias = added.add_(math.log(block_size)).masked_fill_(~compensated, -math.inf)
    return Tail(pooled.k, pooled.v, bias, pooled.k_var if half_variance is None else None)
