"""The oracle: the whole method in float64, written as the equations read, sharing no code with the stages it judges."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # the oracle runs on torch alone
    from ..config import SparseConfig
    from ..orders import Blocks
    from .inputs import Inputs


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
    b, isolated = blocks.block_size, blocks.isolated.cpu()
    nb = len(blocks.tiled) // b
    out = torch.empty(q.shape, dtype=torch.float64)
    critical = torch.zeros(batch, heads, nb, nb, dtype=torch.bool)
    compensated = torch.zeros_like(critical)
    probability = torch.zeros(batch, heads, nb, nb + 1, dtype=torch.float64)
    r = torch.zeros(batch, heads, nb, dtype=torch.float64)

    for i in range(batch):
        ones = torch.ones(blocks.leftover, dtype=torch.bool)
        valid = torch.cat([ones, inputs.text_mask[i].cpu()])
        alone = isolated[valid]
        for h in range(heads):
            tiled = (blocks.tiled if inputs.token_order is None else inputs.token_order[i, h]).long().cpu()
            qt, kt, vt = (x[i, tiled, h].view(nb, b, x.shape[-1]) for x in (q, k, v))
            k_alone, v_alone = k[i, alone, h], v[i, alone, h]
            q_mean, k_mean, v_mean = qt.mean(1), kt.mean(1), vt.mean(1)
            dq, dk = (qt - q_mean[:, None]).abs().mean(1), (kt - k_mean[:, None]).abs().mean(1)
            columns, log_b = k_alone, torch.tensor(float(b), dtype=torch.float64).log()
            if config.rectify == "pooled":
                columns, log_b = _pooled_columns(k[i, isolated, h], valid, blocks.leftover, b), log_b * 0

            for n in range(nb):
                logits = torch.cat([scale * (k_mean @ q_mean[n]) + log_b, scale * (columns @ q_mean[n])])
                weights = (logits - logits.max()).exp()
                weights = weights / weights.sum()
                p = torch.cat([weights[:nb], weights[nb:].sum().view(1)])
                keep = block_mask[i, h, n].cpu() if block_mask is not None else critical_blocks(p, n, blocks, config)
                dropped = ~keep
                worth = (k_mean @ q_mean[n]).abs()
                error = (k_mean @ dq[n]).abs() + (dk @ q_mean[n]).abs()
                compensate = dropped
                if config.rectify == "none":
                    compensate = torch.zeros_like(dropped)
                elif config.rectify == "ipar+gapr":
                    compensate = dropped & (worth > error)

                k_kept = torch.cat([kt[keep].flatten(0, 1), k_alone])
                v_kept = torch.cat([vt[keep].flatten(0, 1), v_alone])
                if not len(k_kept) and config.rectify != "row":
                    raise ValueError(f"block_mask: got no critical block for query block {n}; allowed: at least one.")
                r[i, h, n] = 1 - p[:nb][compensate].sum()  # an empty sum is 0, also where p is not finite
                if config.rectify == "row":
                    result = with_pooled_keys(qt[n], k_kept, v_kept, kt[compensate], vt[compensate], scale)
                else:
                    attended = (scale * (qt[n] @ k_kept.T)).softmax(-1) @ v_kept
                    result = r[i, h, n] * attended + (p[:nb][compensate, None] * v_mean[compensate]).sum(0)
                out[i, tiled[n * b : (n + 1) * b], h] = result
                critical[i, h, n], compensated[i, h, n], probability[i, h, n] = keep, compensate, p

            every_k, every_v = torch.cat([kt.flatten(0, 1), k_alone]), torch.cat([vt.flatten(0, 1), v_alone])
            out[i, isolated, h] = (scale * (q[i, isolated, h] @ every_k.T)).softmax(-1) @ every_v

    plan = (critical, compensated, probability, r)
    return Reference(out.to(device), *(x.to(device) for x in plan))


def with_pooled_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_blocks: torch.Tensor, v_blocks: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of q [b, D] to k, v [keys, D] and to blocks [m, b, D], each one key that stands for all of its own."""
    logits = scale * (q @ k.T)
    for block in k_blocks:
        mean = block.mean(0)
        spread = ((block - mean) ** 2).mean(0)
        half_variance = 0.5 * scale**2 * (q.mean(0) ** 2 * spread).sum()
        pooled = scale * (q @ mean) + math.log(len(block)) + min(half_variance.item(), 2.0)
        logits = torch.cat([logits, pooled[:, None]], dim=1)
    return logits.softmax(-1) @ torch.cat([v, v_blocks.mean(1)])


def critical_blocks(p: torch.Tensor, n: int, blocks: "Blocks", config: "SparseConfig") -> torch.Tensor:
    """bool [nb]: stage 3 for query block n, from its row of the estimate, p [nb + 1]."""
    nb = len(p) - 1
    if config.top_p == 1 or not p.isfinite().all():
        return torch.ones(nb, dtype=torch.bool)
    by_probability = sorted(range(nb), key=lambda m: (-p[m].item(), m))
    top_k = max(1, int((1 - config.sparsity) * nb))
    reached, for_top_p = p[nb].item(), 0
    while reached < config.top_p and for_top_p < nb:
        reached += p[by_probability[for_top_p]].item()
        for_top_p += 1
    keep = torch.zeros(nb, dtype=torch.bool)
    keep[by_probability[: max(top_k, for_top_p)]] = True
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
