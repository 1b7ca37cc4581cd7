"""What a block leaves undone where its pooled key stands for it: stage 3 keeps blocks by it. Not in the paper."""

import math
from typing import NamedTuple

import torch

from .arrange import DIRECTIONS, sample_of
from .groups import product
from .pool import Pooled
from .tail import CAP

SAMPLED = 32  # queries of a block that tell its residuals


class Directions(NamedTuple):
    """scale * q·(k - k̄) seen in r = min(8, D) directions: about (q @ Q)·((k - k̄) @ K), Q and K being [B, Hk, D, r]."""

    q: torch.Tensor
    k: torch.Tensor


class Responses(NamedTuple):
    """Of every block: how its queries look in the directions, mean (q Q)(q Q)ᵀ, [B, H, nb, r, r]; and how its values
    follow its keys there, C Cᵀ, [B, Hk, nb, r, r], with C = mean ((k - k̄) K)(v - v̄)ᵀ, [r, D].
    """

    q: torch.Tensor
    kv: torch.Tensor


def principal(covariance: torch.Tensor, weigh: torch.Tensor) -> torch.Tensor:
    """W [Z, n, r], Wᵀ C W = 1: the r = min(DIRECTIONS, n) principal directions of S C; C and S symmetric, [Z, n, n].

    Where C is singular, W is 0 in what C does not reach.
    """
    values, vectors = torch.linalg.eigh(covariance.nan_to_num(0.0, 0.0, 0.0))
    some = values > 100 * torch.finfo(values.dtype).eps * values[:, -1:]
    root = values.where(some, 0).sqrt()[:, None]
    seen = (vectors * root).transpose(1, 2) @ weigh.nan_to_num(0.0, 0.0, 0.0) @ (vectors * root)
    main = torch.linalg.eigh(seen.nan_to_num(0.0, 0.0, 0.0))[1][:, :, -DIRECTIONS:]
    return (vectors / root.where(some[:, None], math.inf)) @ main


def directions(q: torch.Tensor, k: torch.Tensor, tiled: torch.Tensor, scale: float) -> Directions:
    """The directions of every key head in which its keys differ most for its queries.

    q: [B, S, H, D]; k: [B, S, Hk, D].
    K are the r principal directions of M_q C_k, Kᵀ C_k K = 1, with C_k the covariance of keys and M_q = scale² mean
    q qᵀ over all queries that share them, from the sample that sorting takes; Q = scale * C_k K. Zeros where they are
    not finite.
    """
    batch, _, heads, _ = k.shape
    some_q, some_k = sample_of(q, tiled, q.shape[2] // heads), sample_of(k, tiled)
    apart = some_k - some_k.mean(1, keepdim=True)
    covariance = apart.transpose(1, 2) @ apart / some_k.shape[1]
    to_k = principal(covariance, scale**2 * (some_q.transpose(1, 2) @ some_q / some_q.shape[1]))
    both = Directions(scale * (covariance @ to_k), to_k)
    return Directions(*(x.nan_to_num(0.0, 0.0, 0.0).unflatten(0, (batch, heads)) for x in both))


def responses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of: Directions) -> Responses:
    """q: [B, H, nb, b, D]; k, v: [B, Hk, nb, b, D]; any floating dtype."""
    rank, size, group = of.k.shape[3], q.shape[3], q.shape[1] // k.shape[1]
    both = Responses(*(of.k.new_empty(*x.shape[:3], rank, rank) for x in (q, k)))
    for h in range(q.shape[1]):  # one head at a time, so that a long video needs no copy of all
        seen = q[:, h].to(of.q.dtype) @ of.q[:, h // group, None]
        torch.matmul(seen.transpose(-1, -2), seen, out=both.q[:, h]).div_(size)
    for h in range(k.shape[1]):
        keys, values = (x[:, h].to(of.k.dtype) for x in (k, v))
        seen_k = (keys - keys.mean(2, keepdim=True)) @ of.k[:, h, None]
        follow = seen_k.transpose(-1, -2) @ (values - values.mean(2, keepdim=True)) / size  # [B, nb, r, D]
        torch.matmul(follow, follow.transpose(-1, -2), out=both.kv[:, h])
    return both


def sampled_rows(block_size: int) -> range:
    """Which queries of a block are looked at: all, or SAMPLED evenly spread ones."""
    step = max(1, block_size // SAMPLED)
    return range(step // 2, block_size, step)


def told_by_means(probability: torch.Tensor, half_variance: torch.Tensor) -> torch.Tensor:
    """P_nm σ_nm, [B, H, nb, nb]. probability: [B, H, nb, nb + 1]; half_variance: ½σ², [B, H, nb, nb]."""
    return probability[..., :-1] * (2 * half_variance).sqrt_()


def told_by_queries(
    q: torch.Tensor, pooled: Pooled, k_isolated: torch.Tensor, valid: torch.Tensor, scale: float
) -> torch.Tensor:
    """The root mean square over sampled queries i of block n of P_im σ_im, [B, H, nb, nb].

    P_i is the softmax of query i over pooled keys, with log b + min(½σ²_im, CAP), and isolated ones, and σ²_im = scale²
    Σ_d q_id² Var_m,d. The mean query of a block does not show where single queries look.

    q: [B, H, nb, b, D], any floating dtype; k_isolated: [B, Hk, I, D]; valid: bool [B, I].
    """
    if pooled.k_var is None:
        raise ValueError("told_by_queries: got block statistics without the variance of keys; pool with the same rule.")
    heads, size, result = q.shape[1], q.shape[3], pooled.q.new_empty(*q.shape[:3], q.shape[2])
    for h in range(heads):  # one head at a time, so that a long video needs no matrix of all
        of_k = h // (heads // pooled.k.shape[1])
        asked = scale * q[:, h, :, sampled_rows(size)].flatten(1, 2).to(pooled.q.dtype)  # [B, nb * sampled, D]
        half = 0.5 * asked.square() @ pooled.k_var[:, of_k].transpose(1, 2)  # ½σ²
        logits = asked @ pooled.k[:, of_k].transpose(1, 2) + half.clamp(max=CAP) + math.log(size)
        alone = asked @ k_isolated[:, of_k].to(asked.dtype).transpose(1, 2)
        total = torch.cat([logits, alone.masked_fill_(~valid[:, None], -math.inf)], 2).logsumexp(2, keepdim=True)
        square = logits.sub_(total).exp_().square_().mul_(2 * half)
        result[:, h] = square.unflatten(1, (q.shape[2], -1)).mean(2).sqrt_()
    return result


def residual(told: torch.Tensor, of: Responses) -> torch.Tensor:
    """told [B, H, nb, nb] times the root mean square over the queries of block n of |scale * q H_m|.

    H_m = mean (k - k̄)(v - v̄)ᵀ over block m says how its values follow its keys, and scale * q H_m is what the pooled
    value misses, to first order.
    """
    moved = product(of.q.flatten(-2), of.kv.flatten(-2).transpose(-1, -2))  # mean |scale * q H_m|²
    return told * moved.clamp_(min=0).sqrt_()
