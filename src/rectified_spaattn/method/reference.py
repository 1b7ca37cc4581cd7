"""The oracle: the whole method in float64, written as the equations read, sharing no code with the stages it judges."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # the oracle runs on torch alone
    from ..config import SparseConfig
    from ..orders import Blocks
    from .inputs import Inputs

_BY_ERROR = ("row+slope", "query+slope")  # modes that choose blocks by the error they would leave


class Reference(NamedTuple):
    """out: [B, S, H, D] float64, and the plan as in SparseStats (float64, bool)."""

    out: torch.Tensor
    block_mask: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor


def reference(inputs: "Inputs") -> Reference:
    """Rectified sparse attention by loops over batch, heads and query blocks."""
    blocks, config, scale, block_mask = inputs.blocks, inputs.config, inputs.scale, inputs.block_mask
    device = inputs.q.device
    q, k, v = inputs.q.double().cpu(), inputs.k.double().cpu(), inputs.v.double().cpu()
    batch, _, heads, _ = q.shape
    group = heads // k.shape[2]
    b, isolated = blocks.block_size, blocks.isolated.cpu()
    nb = len(blocks.tiled) // b
    own, by_error = config.rectify == "query+slope", config.rectify in _BY_ERROR
    tail = by_error or config.rectify == "row"
    out = torch.zeros(q.shape, dtype=torch.float64)
    critical = torch.zeros(batch, heads, nb, nb, dtype=torch.bool)
    compensated = torch.zeros_like(critical)
    probability = torch.zeros(batch, heads, nb, nb + 1, dtype=torch.float64)
    r = torch.zeros(batch, heads, nb, dtype=torch.float64)

    for i in range(batch):
        ones = torch.ones(blocks.leftover, dtype=torch.bool)
        valid = torch.cat([ones, inputs.text_mask[i].cpu()])
        alone = isolated[valid]
        for h in range(heads):
            of_k = h // group
            tiled = (blocks.tiled if inputs.token_order is None else inputs.token_order[i, of_k]).long().cpu()
            qt = q[i, tiled, h].view(nb, b, q.shape[-1])
            kt, vt = (x[i, tiled, of_k].view(nb, b, x.shape[-1]) for x in (k, v))
            k_alone, v_alone = k[i, alone, of_k], v[i, alone, of_k]
            q_mean, k_mean, v_mean = qt.mean(1), kt.mean(1), vt.mean(1)
            dq, dk = (qt - q_mean[:, None]).abs().mean(1), (kt - k_mean[:, None]).abs().mean(1)
            columns, log_b = k_alone, torch.tensor(float(b), dtype=torch.float64).log()
            if config.rectify == "pooled":
                columns, log_b = _pooled_columns(k[i, isolated, of_k], valid, blocks.leftover, b), log_b * 0

            p = _probability(q_mean, k_mean, columns, log_b, scale)
            if block_mask is not None:
                keep = block_mask[i, h].cpu()
            else:
                top_k = max(1, int((1 - config.sparsity) * nb)) if inputs.top_k is None else inputs.top_k[i, h].item()
                rows = [critical_row(p[n], n, blocks, config, top_k) for n in range(nb)]
                keep = torch.stack(rows) if nb else critical[i, h]
                if by_error and nb:
                    sample = blocks.tiled.cpu()[:: -(-len(tiled) // 2048)]
                    sharing = q[i, sample, of_k * group : (of_k + 1) * group].flatten(0, 1)
                    told = _told_by_queries(qt, kt, k_alone, scale) if own else _told_by_means(p, qt, kt, scale)
                    left = told * _moved(qt, kt, vt, sharing, k[i, sample, of_k], scale)
                    keep = keep | _largest_errors(left, int(top_k * nb))
            compensate = ~keep
            if config.rectify == "none":
                compensate = torch.zeros_like(keep)
            elif config.rectify == "ipar+gapr":
                worth = (q_mean @ k_mean.T).abs()
                compensate = compensate & (worth > (dq @ k_mean.T).abs() + (q_mean @ dk.T).abs())
            slope = torch.zeros(q.shape[-1], q.shape[-1], dtype=torch.float64)
            if by_error:
                slope = _slope(p, compensate, qt, kt, vt, scale, own)

            for n in range(nb):
                k_kept = torch.cat([kt[keep[n]].flatten(0, 1), k_alone])
                v_kept = torch.cat([vt[keep[n]].flatten(0, 1), v_alone])
                if not len(k_kept) and not tail:
                    raise ValueError(f"block_mask: got no critical block for query block {n}; allowed: at least one.")
                # an empty sum is 0, also where p is not finite
                r[i, h, n] = 1 - p[n, :nb][compensate[n]].sum()
                if tail:
                    dropped = kt[compensate[n]], vt[compensate[n]]
                    result = with_pooled_keys(qt[n], k_kept, v_kept, *dropped, slope, scale, own)
                else:
                    attended = (scale * (qt[n] @ k_kept.T)).softmax(-1) @ v_kept
                    result = r[i, h, n] * attended + (p[n, :nb][compensate[n], None] * v_mean[compensate[n]]).sum(0)
                out[i, tiled[n * b : (n + 1) * b], h] = result
            critical[i, h], compensated[i, h], probability[i, h] = keep, compensate, p

            every_k, every_v = torch.cat([kt.flatten(0, 1), k_alone]), torch.cat([vt.flatten(0, 1), v_alone])
            out[i, isolated, h] = (scale * (q[i, isolated, h] @ every_k.T)).softmax(-1) @ every_v
            for at in blocks.apart.tolist():
                others = [t for t in blocks.apart.tolist() if valid[t] and (t <= at or not blocks.causal)]
                seen, query = isolated[others], q[i, isolated[at], h]
                out[i, isolated[at], h] = (scale * (k[i, seen, of_k] @ query)).softmax(-1) @ v[i, seen, of_k]

    plan = (critical, compensated, probability, r)
    return Reference(out.to(device), *(x.to(device) for x in plan))


def _probability(
    q_mean: torch.Tensor, k_mean: torch.Tensor, columns: torch.Tensor, log_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """[nb, nb + 1] by means [nb, D] and the columns of isolated keys [c, D]."""
    nb = len(q_mean)
    probability = torch.zeros(nb, nb + 1, dtype=torch.float64)
    for n in range(nb):
        logits = torch.cat([scale * (k_mean @ q_mean[n]) + log_b, scale * (columns @ q_mean[n])])
        weights = (logits - logits.max()).exp()
        weights = weights / weights.sum()
        probability[n] = torch.cat([weights[:nb], weights[nb:].sum().view(1)])
    return probability


def _half_variance(q: torch.Tensor, block: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows]: half the variance of the logits that each of q [rows, D] gives to the keys of a block [b, D]."""
    spread = ((block - block.mean(0)) ** 2).mean(0)
    return 0.5 * scale**2 * (q**2 * spread).sum(1)


def with_pooled_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_blocks: torch.Tensor,
    v_blocks: torch.Tensor,
    slope: torch.Tensor,
    scale: float,
    own: bool,
) -> torch.Tensor:
    """Attention of q [b, D] to k, v [keys, D] and to blocks [m, b, D], each one key that stands for all of its own,
    whose values move by scale * q @ slope. own: every query counts how its keys spread for itself, not for the mean.
    """
    logits = scale * (q @ k.T)
    for block in k_blocks:
        spread = _half_variance(q if own else q.mean(0, keepdim=True), block, scale).clamp(max=2)
        pooled = scale * (q @ block.mean(0)) + math.log(len(block)) + spread
        logits = torch.cat([logits, pooled[:, None]], dim=1)
    weights = logits.softmax(-1)
    share = weights[:, len(k) :].sum(1, keepdim=True)
    return weights @ torch.cat([v, v_blocks.mean(1)]) + share * (scale * q @ slope)


def _moving_together(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """mean (k - mean k)(v - mean v)ᵀ of one block: k [b, r], v [b, D]."""
    return (k - k.mean(0)).T @ (v - v.mean(0)) / len(k)


def _slope(
    p: torch.Tensor,
    compensate: torch.Tensor,
    qt: torch.Tensor,
    kt: torch.Tensor,
    vt: torch.Tensor,
    scale: float,
    own: bool,
) -> torch.Tensor:
    """H [D, D], the mean over the blocks of how values move with keys, weighed by what tails there are."""
    total, weights = torch.zeros(kt.shape[2], vt.shape[2], dtype=torch.float64), 0.0
    for m in range(len(kt)):
        weight = 0.0
        for n in compensate[:, m].nonzero().flatten().tolist():
            half = 0.0 if own else _half_variance(qt[n].mean(0, keepdim=True), kt[m], scale).item()
            weight += p[n, m].item() * math.exp(min(half, 2.0))
        if weight:
            total, weights = total + weight * _moving_together(kt[m], vt[m]), weights + weight
    return total / weights if weights else total


def _told_by_means(p: torch.Tensor, qt: torch.Tensor, kt: torch.Tensor, scale: float) -> torch.Tensor:
    """[nb, nb]: the weight of block m for the mean query of block n, times the deviation of the logits in it."""
    halves = torch.cat([_half_variance(qt.mean(1), block, scale)[:, None] for block in kt], 1)
    return p[:, :-1] * (2 * halves).sqrt()


def _told_by_queries(qt: torch.Tensor, kt: torch.Tensor, k_alone: torch.Tensor, scale: float) -> torch.Tensor:
    """[nb, nb]: the same for single queries, at most 32 of block n, each with its own softmax over block means and
    isolated keys; their root mean square.
    """
    told = torch.zeros(len(qt), len(kt), dtype=torch.float64)
    every = max(1, qt.shape[1] // 32)
    for n in range(len(qt)):
        some = qt[n][every // 2 :: every]
        halves = torch.stack([_half_variance(some, block, scale) for block in kt], dim=1)  # [some, nb]
        logits = scale * some @ kt.mean(1).T + math.log(kt.shape[1]) + halves.clamp(max=2)
        shares = torch.cat([logits, scale * some @ k_alone.T], dim=1).softmax(1)[:, : len(kt)]
        told[n] = (shares**2 * 2 * halves).mean(0).sqrt()
    return told


def _moved(
    qt: torch.Tensor,
    kt: torch.Tensor,
    vt: torch.Tensor,
    q_sample: torch.Tensor,
    k_sample: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[nb, nb]: how far queries of block n move the values of block m to first order, root mean square.

    The product of how values move with keys and a query is taken in the 8 directions in which the sample's logits vary
    most: with C = LᵀL the covariance of keys and Z the main eigenvectors of L M Lᵀ, M = scale² mean q qᵀ, it is
    q·(k - k̄) = (L q)·(L⁻ᵀ (k - k̄)), and Z Zᵀ between the two keeps 8 of them.
    """
    nb, dim = len(kt), k_sample.shape[1]
    result = torch.zeros(nb, nb, dtype=torch.float64)
    apart = k_sample - k_sample.mean(0)
    values, vectors = torch.linalg.eigh((apart.T @ apart / len(apart)).nan_to_num())
    values = values.clamp(min=0)
    root = vectors @ values.sqrt().diag() @ vectors.T
    inverse = vectors @ torch.where(values > 1e-12 * values.max(), values, math.inf).rsqrt().diag() @ vectors.T
    seen = scale**2 * root @ (q_sample.T @ q_sample / len(q_sample)).nan_to_num() @ root
    main = torch.linalg.eigh(seen)[1][:, -min(8, dim) :]
    for m in range(nb):
        moving = _moving_together(kt[m] @ inverse @ main, vt[m])
        for n in range(nb):
            result[n, m] = (scale * qt[n] @ root @ main @ moving).square().sum(1).mean().sqrt()
    return result


def _largest_errors(left: torch.Tensor, budget: int) -> torch.Tensor:
    """The largest of every row, and of the rest the largest, as many as fit in the budget with all their equals."""
    left = left.nan_to_num()
    keep = torch.zeros_like(left, dtype=torch.bool)
    for n in range(len(left)):
        keep[n, left[n].argmax()] = True
    for value in left[~keep].unique().flip(0):
        more = keep | (left == value)
        if more.sum() > budget:
            break
        keep = more
    return keep


def critical_row(
    p: torch.Tensor, n: int, blocks: "Blocks", config: "SparseConfig", top_k: float | None = None
) -> torch.Tensor:
    """bool [nb]: stage 3 for query block n, from its row of the estimate, p [nb + 1]. top_k: in place of sparsity."""
    nb = len(p) - 1
    if config.top_p == 1 or not p.isfinite().all():
        return torch.ones(nb, dtype=torch.bool)
    by_probability = sorted(range(nb), key=lambda m: (-p[m].item(), m))
    at_least = int((1 - config.sparsity) * nb) if top_k is None else int(top_k)
    at_least = 0 if config.rectify in _BY_ERROR else max(1, at_least)
    reached, for_top_p = p[nb].item(), 0
    while reached < config.top_p and for_top_p < nb:
        reached += p[by_probability[for_top_p]].item()
        for_top_p += 1
    keep = torch.zeros(nb, dtype=torch.bool)
    keep[by_probability[: max(at_least, for_top_p)]] = True
    if config.neighbours:
        keep |= blocks.neighbours[n].cpu()
    if config.first_frame and blocks.first_frame[n]:
        keep |= blocks.first_frame.cpu()
    return keep


def _pooled_columns(k_isolated: torch.Tensor, valid: torch.Tensor, leftover: int, b: int) -> torch.Tensor:
    """One mean for the leftover video tokens, one for every b text tokens, over the valid ones: [columns, D]."""
    starts = [0] if leftover else []
    starts += range(leftover, len(valid), b)
    spans = [span for span in pairwise([*starts, len(valid)]) if valid[slice(*span)].any()]
    means = [k_isolated[s:e][valid[s:e]].mean(0) for s, e in spans]
    return torch.stack(means) if means else k_isolated[:0]
