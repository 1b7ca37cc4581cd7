"""Is it right? Everything that is timed is compared with float64 first.

The error budget comes from what scaled_dot_product_attention does on the same numbers in the same dtype: twice its
error, and rounding: one more in the dtype for R * sparse + C, and a few in float32, in which plans are made.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...attention import SparseStats, rectified_attention
from ...config import SparseConfig
from ...method.select import top_k_of
from ...method.tail import CAP
from ...orders import Blocks
from .baselines import BASELINES, sdpa
from .shapes import BenchError, Case, Tensors, Variant

_SAMPLED_BLOCKS = 8
_SAME_CHOICES = 0.99  # gains that equal their error up to rounding may fall on either side
_R_TOLERANCE = 1e-2


class Check(NamedTuple):
    """error, allowed: largest absolute error over the largest exact value."""

    name: str
    what: str
    error: float
    allowed: float


def check_dense(case: Case, name: str) -> Check:
    """A baseline against float64 on the small form of the case. Raises BenchError where it is wrong."""
    qkv = case.small().inputs(0)[0]
    return require(_against_sdpa(name, "dense attention", BASELINES[name].run(*qkv), qkv))


def check_small(case: Case, name: str) -> list[Check]:
    """A backend on the small form of the case: with every block kept, and as configured against the reference backend.

    Raises BenchError where it is wrong.
    """
    small = case.small()
    layout, blocks, config, qkv = small.layout(), small.blocks(), case.config, small.inputs(0)[0]
    whole = rectified_attention(*qkv, layout, config.replace(sparsity=0.0), backend=name)
    dense = require(_against_sdpa(name, "sparsity 0 is dense attention", whole, qkv))

    qkv = _blockwise(qkv, blocks)
    got, stats = rectified_attention(*qkv, layout, config, backend=name, return_stats=True)
    order, mask = _order_of(name, stats, blocks), stats.block_mask
    want, oracle = rectified_attention(
        *qkv, layout, config, block_mask=mask, token_order=stats.token_order, backend="reference", return_stats=True
    )
    _require_choices(name, stats, oracle, blocks, config)
    same = (stats.compensated == oracle.compensated).all(-1)  # [1, H, nb]
    compared = _tokens_of(same, blocks, order)  # bool [1, S, H]
    budget = _against_sdpa(name, "", sdpa(*qkv), qkv).allowed
    error = _largest((got.double() - want)[compared]) / _largest(want)
    return [dense, require(Check(name, f"{config.sparsity:.4g} sparse is the reference", error, budget))]


def check_sample(case: Case, variant: Variant, qkv: Tensors, generator: torch.Generator) -> tuple[list[Check], float]:
    """A backend at full size: some random query blocks, and all isolated queries of one head, against float64.

    qkv: [1, S, H, D]; generator: on the CPU. Also returns the density. Raises BenchError where the backend is wrong.
    """
    name, config, blocks = str(variant), case.config_of(variant), case.blocks()
    out, stats = rectified_attention(*qkv, case.layout(), config, backend=variant.name, return_stats=True)
    heads, nb = stats.r.shape[1:]
    order = _order_of(name, stats, blocks)
    compensation = (stats.probability[..., :-1] * stats.compensated).sum(-1)
    off = _largest(stats.r - (1 - compensation))
    checks = [Check(name, "R", off, _R_TOLERANCE)]

    errors = []
    for _ in range(_SAMPLED_BLOCKS):
        h, n = (int(torch.randint(high, (), generator=generator)) for high in (heads, nb))
        errors.append(_block_errors(h, n, out, stats, qkv, order.view(heads, nb, -1)[h], blocks.isolated, config))
    checks.append(_worst(name, "sampled blocks", errors, case.dtype))
    if blocks.isolated.numel():
        h = int(torch.randint(heads, (), generator=generator))
        exact, own = _attend(blocks.isolated, torch.cat([blocks.tiled, blocks.isolated]), h, qkv)
        error = (out[0, blocks.isolated, h].double() - exact, own - exact, exact)
        checks.append(_worst(name, "isolated queries", [error], case.dtype))
    return [require(each) for each in checks], stats.density


# the error, SDPA's own error and the exact output of some queries, each [queries, D]
_Errors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _block_errors(
    h: int,
    n: int,
    out: torch.Tensor,
    stats: SparseStats,
    qkv: Tensors,
    places: torch.Tensor,
    isolated: torch.Tensor,
    config: SparseConfig,
) -> _Errors:
    """Query block n of head h in float64, from the stats' choices. places: [nb, b], of the head's tiled tokens."""
    keys = torch.cat([places[stats.block_mask[0, h, n]].flatten(), isolated])
    got, (exact, own) = out[0, places[n], h].double(), _attend(places[n], keys, h, qkv)
    if config.rule.tail:
        slope = _slope(h, stats, qkv, places) if config.rule.slope else None
        want = _with_pooled_keys(places[n], keys, places[stats.compensated[0, h, n]], h, qkv, slope)
        return got - want, own - exact, want
    weights = stats.probability[0, h, n, :-1].double() * stats.compensated[0, h, n]
    v_mean = qkv[2][0, places, h].double().mean(1)  # [nb, D]
    r = stats.r[0, h, n].double()
    want = r * exact + weights @ v_mean
    return got - want, r * (own - exact), want


def _attend(queries: torch.Tensor, keys: torch.Tensor, h: int, qkv: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some tokens of head h to others, in float64 and by SDPA in the inputs' dtype: [queries, D] twice."""
    q, k, v = (x[0, places, h] for x, places in zip(qkv, (queries, keys, keys), strict=True))
    own = scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    logits = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v.double(), own.double()


def _with_pooled_keys(
    queries: torch.Tensor, keys: torch.Tensor, pooled: torch.Tensor, h: int, qkv: Tensors, slope: torch.Tensor | None
) -> torch.Tensor:
    """What a tail makes of some tokens of head h, float64 [queries, D]. pooled: places [blocks, b] of one key each;
    slope: [D, D].
    """
    scale = qkv[0].shape[-1] ** -0.5
    q, k, v = (x[0, places, h].double() for x, places in zip(qkv, (queries, keys, keys), strict=True))
    k_blocks, v_blocks = (x[0, pooled, h].double() for x in qkv[1:])  # [blocks, b, D]
    spread = scale**2 * k_blocks.var(1, unbiased=False) @ q.mean(0).square()
    added = math.log(pooled.shape[1]) + (spread / 2).clamp(max=CAP)
    logits = torch.cat([scale * q @ k.T, scale * q @ k_blocks.mean(1).T + added], 1)
    weights = logits.softmax(-1)
    out = weights @ torch.cat([v, v_blocks.mean(1)])
    return out if slope is None else out + weights[:, len(keys) :].sum(1, keepdim=True) * (q @ slope)


def _slope(h: int, stats: SparseStats, qkv: Tensors, places: torch.Tensor) -> torch.Tensor:
    """scale * H of head h, float64 [D, D], from the stats' choices. places: [nb, b]."""
    scale = qkv[0].shape[-1] ** -0.5
    q, k, v = (x[0, places, h].double() for x in qkv)  # [nb, b, D]
    half_variance = scale**2 / 2 * q.mean(1).square() @ k.var(1, unbiased=False).T
    mass = stats.probability[0, h, :, :-1].double() * half_variance.clamp(max=CAP).exp() * stats.compensated[0, h]
    weight = mass.sum(0) / mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
    apart = (k - k.mean(1, keepdim=True)) * (scale / k.shape[1] * weight)[:, None, None]
    return apart.flatten(0, 1).T @ (v - v.mean(1, keepdim=True)).flatten(0, 1)


def _worst(name: str, what: str, errors: list[_Errors], dtype: torch.dtype) -> Check:
    error, own, want = (max(map(_largest, part)) for part in zip(*errors, strict=True))
    return Check(name, what, error / want, _budget(own / want, dtype))


def _against_sdpa(name: str, what: str, got: torch.Tensor, qkv: Tensors) -> Check:
    exact = sdpa(*(x.double() for x in qkv))
    error, own = (_largest(x.double() - exact) / _largest(exact) for x in (got, sdpa(*qkv)))
    return Check(name, what, error, _budget(own, qkv[0].dtype))


def _budget(sdpa_error: float, dtype: torch.dtype) -> float:
    return 2 * sdpa_error + torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def _require_choices(name: str, stats: SparseStats, oracle: SparseStats, blocks: Blocks, config: SparseConfig) -> None:
    """Stages 3 and 4 made the reference's choices, up to ties."""
    best = _best_blocks(oracle.probability, blocks, config)
    sizes, wanted = stats.block_mask.sum(-1), best.sum(-1)
    probability = oracle.probability[..., :-1]
    mass, most = ((probability * mask).sum(-1) for mask in (stats.block_mask, best))
    same = float((stats.compensated == oracle.compensated).float().mean())
    problem = ""
    if config.rule.choice == "error":
        budget = top_k_of(config, blocks.num_blocks) * blocks.num_blocks
        kept = int(stats.block_mask.sum((2, 3)).min())
        if kept < _SAME_CHOICES * budget or not bool(stats.block_mask.any(-1).all()):
            problem = f"{kept} critical blocks a head; allowed: {budget}, or a few less, and one or more a query block"
    elif not float((sizes == wanted).float().mean()) >= (_SAME_CHOICES if config.top_p else 1.0):
        problem = (
            f"{int(sizes.min())} to {int(sizes.max())} critical blocks a query block; allowed: {int(wanted.min())} to "
            f"{int(wanted.max())}, as sparsity, top_p and neighbours ask for"
        )
    elif not bool((mass >= _SAME_CHOICES * most).all()):
        problem = "critical blocks that hold less attention mass than others; allowed: those with the most"
    if not problem and not same >= _SAME_CHOICES:
        problem = f"{same:.1%} of the blocks compensated as the reference does; allowed: {_SAME_CHOICES:.0%} or more"
    if problem:
        raise BenchError(f"{name}: got {problem}. Nothing was timed.")


def _best_blocks(probability: torch.Tensor, blocks: Blocks, config: SparseConfig) -> torch.Tensor:
    """bool [1, H, nb, nb]: stage 3 in its own words. probability: [1, H, nb, nb + 1]."""
    by_mass = probability[..., :-1].double().sort(-1, descending=True)
    before = probability[..., -1:].double() + by_mass.values.cumsum(-1) - by_mass.values  # mass without the block
    top_k = max(1, math.floor((1.0 - config.sparsity) * blocks.num_blocks))
    rank = torch.arange(blocks.num_blocks, device=probability.device)
    kept = (rank < top_k) | (before < config.top_p) | (config.top_p == 1)
    best = torch.zeros_like(kept).scatter(-1, by_mass.indices, kept)
    if config.neighbours:
        best |= blocks.neighbours
    if config.first_frame:
        best |= blocks.first_frame[:, None] & blocks.first_frame
    return best


def require(check: Check) -> Check:
    """Raises BenchError where the error is above what is allowed, or not a number."""
    if not check.error <= check.allowed:
        raise BenchError(
            f"{check.name}, {check.what}: got a relative error of {check.error:.3g}; allowed: "
            f"{check.allowed:.3g}. Nothing was timed."
        )
    return check


def _blockwise(qkv: Tensors, blocks: Blocks) -> Tensors:
    """[1, S, H, D] with tokens of a block near their mean, so that some blocks are worth compensating."""
    b = blocks.block_size
    first = blocks.tiled[::b].repeat_interleave(b)
    q, k, v = (x.index_copy(1, blocks.tiled, x[:, first] + 0.5 * x[:, blocks.tiled]) for x in qkv)
    return q, k, v


def _order_of(name: str, stats: SparseStats, blocks: Blocks) -> torch.Tensor:
    """int64 [H, nb * b]: places of the tiled tokens of the one sample, block after block."""
    if stats.token_order is None:
        return blocks.tiled.expand(stats.r.shape[1], -1)
    order = stats.token_order[0]
    if not bool((order.sort(-1).values == blocks.tiled.sort().values).all()):
        raise BenchError(f"{name}: got an order that does not hold every tiled token once. Nothing was timed.")
    return order


def _tokens_of(same: torch.Tensor, blocks: Blocks, order: torch.Tensor) -> torch.Tensor:
    """bool [1, H, nb] -> bool [1, S, H]: the tokens of these query blocks, and every isolated one."""
    tokens = same.new_ones(1, same.shape[1], blocks.sequence)
    tokens.scatter_(2, order[None], same.repeat_interleave(blocks.block_size, dim=-1))
    return tokens.transpose(1, 2)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())
