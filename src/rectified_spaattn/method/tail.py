"""Stage 5 of "row": what the pooled keys of compensated blocks add to their logits. Not in the paper."""

import math

import torch

from .pool import Pooled

CAP = 2.0  # largest ½σ²; docs/quality.md has the measurement


def tail_bias(pooled: Pooled, compensated: torch.Tensor, scale: float, block_size: int) -> torch.Tensor:
    """log b + min(½σ²_nm, CAP) for compensated blocks m of query block n, -inf for the others: [B, H, nb, nb].

    The b keys of a block give a query the mass Σ exp(scale * q·k) = b * exp(scale * q·k̄ + ½σ² + ...), where σ² is the
    variance of scale * q·k in the block: σ²_nm = scale² Σ_d q̄²_nd Var_m,d, by the mean query and a diagonal covariance.
    """
    if pooled.k_var is None:
        raise ValueError("tail_bias: got block statistics without the variance of keys; pool with rectify='row'.")
    half_variance = (0.5 * scale**2) * pooled.q.square() @ pooled.k_var.transpose(-1, -2)
    return half_variance.clamp_(max=CAP).add_(math.log(block_size)).masked_fill_(~compensated, -math.inf)
