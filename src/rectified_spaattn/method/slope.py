"""Stage 5 where the rule has a slope: how a head's values follow its keys within dropped blocks. Not in the paper."""

import torch

from .pool import Pooled
from .tail import CAP


def slope(
    probability: torch.Tensor,
    half_variance: torch.Tensor | None,
    compensated: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled: Pooled,
    scale: float,
) -> torch.Tensor:
    """scale * H, [B, H, D, D]: a query of which the tail has a share of the softmax gets share * q (scale * H) besides.

    A query gives the keys of a block weights that grow with scale * q·(k - k̄), so that the mean of their values is
    v̄ + scale * q H_m to first order, H_m = mean (k - k̄)(v - v̄)ᵀ over the block. One H stands for all blocks of a head:
    H = Σ w_m H_m, w_m in proportion to the mass Σ_n P_nm exp(min(½σ²_nm, CAP)) that block m has in the tails, or to
    Σ_n P_nm without half_variance.

    probability: [B, H, nb, nb + 1]; half_variance, compensated: [B, H, nb, nb]; k, v: [B, Hk, nb, b, D], any
    dtype.
    """
    mass = probability[..., :-1] * (1 if half_variance is None else half_variance.clamp(max=CAP).exp_())
    mass = mass.masked_fill_(~compensated, 0).sum(-2)  # [B, H, nb]
    weight = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    (batch, heads), dim, group = mass.shape[:2], k.shape[4], mass.shape[1] // k.shape[1]
    result = pooled.k.new_empty(batch, heads, dim, dim)
    for h in range(heads):  # one head at a time, so that a long video needs no copy of all
        used = (weight[:, h] > 0)[..., None, None]  # what no tail holds need not be finite
        apart_k, apart_v = (
            (x[:, h // group] - mean[:, h // group, :, None]).where(used, 0)
            for x, mean in ((k, pooled.k), (v, pooled.v))
        )
        apart_k *= (scale / k.shape[3]) * weight[:, h, :, None, None]
        torch.matmul(apart_k.flatten(1, 2).transpose(1, 2), apart_v.flatten(1, 2), out=result[:, h])
    return result
