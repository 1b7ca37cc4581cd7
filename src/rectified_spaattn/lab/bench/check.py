"""Is it right? Everything that is timed is compared with float64 first.

The error budget comes from what scaled_dot_product_attention does on the same numbers in the same dtype: twice its
error, and rounding: one more in the dtype for R * sparse + C, and a few in float32, in which plans are made.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...attention import SparseStats, rectified_attention
from ...config import SparseConfig
from ...method.reference import critical_row, with_pooled_keys
from ...method.select import top_k_of
from ...method.tail import CAP
from ...orders import Blocks
from .baselines import BASELINES, sdpa
from .shapes import BenchError, Case, Tensors, Variant

_SAMPLED_BLOCKS = 8
_SAME_CHOICES = 0.99  # gains that equal their error up to rounding may fall on either side
_R_TOLERANCE = 1e-2
_EIGHT_BITS = 2 * 2.0**-4  # float8 (e4m3) rounds a number by a sixteenth at most: a weight, and its value


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


class _Call(NamedTuple):
    """One sparse call, its keys and orders repeated for every query head. order: int64 [H, nb * b], places of the tiled
    tokens, block after block.
    """

    name: str
    config: SparseConfig
    blocks: Blocks
    qkv: Tensors
    out: torch.Tensor
    stats: SparseStats
    order: torch.Tensor


def _call(case: Case, name: str, backend: str, config: SparseConfig, qkv: Tensors) -> _Call:
    """Raises BenchError for an order that is none."""
    out, stats = rectified_attention(*qkv, case.layout(), config, backend=backend, return_stats=True)
    blocks = case.blocks()
    order = blocks.tiled.expand(stats.r.shape[1], -1) if stats.token_order is None else stats.token_order[0]
    if not bool((order.sort(-1).values == blocks.tiled.sort().values).all()):
        raise BenchError(f"{name}: got an order that does not hold every tiled token once. Nothing was timed.")
    q, k, v = qkv
    if k.shape[2] < q.shape[2]:
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        order = order.repeat_interleave(q.shape[2] // len(order), 0)
    return _Call(name, config, blocks, (q, k, v), out, stats, order)


def check_small(case: Case, name: str) -> list[Check]:
    """A backend on the small form of the case: with every block kept, and as configured against the reference backend.

    Raises BenchError where it is wrong.
    """
    small, config = case.small(), case.config
    layout, qkv = small.layout(), small.inputs(0)[0]
    whole = rectified_attention(*qkv, layout, config.replace(sparsity=0.0), backend=name)
    dense = require(_against_sdpa(name, "sparsity 0 is dense attention", whole, qkv))

    qkv = _blockwise(qkv, small.blocks())
    call = _call(small, name, name, config, qkv)
    mask, order = call.stats.block_mask, call.stats.token_order
    want, oracle = rectified_attention(
        *qkv, layout, config, block_mask=mask, token_order=order, backend="reference", return_stats=True
    )
    _require_choices(call, oracle)
    same = (call.stats.compensated == oracle.compensated).all(-1)  # [1, H, nb]
    tokens = same.new_ones(1, same.shape[1], layout.sequence)  # of these query blocks, and every isolated one
    tokens.scatter_(2, call.order[None], same.repeat_interleave(config.block_size, dim=-1))
    budget = _against_sdpa(name, "", sdpa(*qkv), qkv).allowed
    error = _largest((call.out.double() - want)[tokens.transpose(1, 2)]) / _largest(want)
    return [dense, require(Check(name, f"{config.sparsity:.4g} sparse is the reference", error, budget))]


def check_sample(case: Case, variant: Variant, qkv: Tensors, generator: torch.Generator) -> tuple[list[Check], float]:
    """A backend at full size: some random query blocks, and all isolated queries of one head, against float64.

    qkv: [1, S, H, D]; generator: on the CPU. Also returns the density. Raises BenchError where the backend is wrong.
    """
    name = str(variant)
    call = _call(case, name, variant.name, case.config_of(variant), qkv)
    stats, isolated = call.stats, call.blocks.isolated
    heads, nb = stats.r.shape[1:]
    compensation = (stats.probability[..., :-1] * stats.compensated).sum(-1)
    checks = [Check(name, "R", _largest(stats.r - (1 - compensation)), _R_TOLERANCE)]
    samples = [
        [int(torch.randint(high, (), generator=generator)) for high in (heads, nb)] for _ in range(_SAMPLED_BLOCKS)
    ]
    checks.append(_worst(name, "sampled blocks", [_block_errors(call, h, n) for h, n in samples], case.dtype))
    if isolated.numel():
        h = int(torch.randint(heads, (), generator=generator))
        exact, own = _attend(isolated, torch.cat([call.blocks.tiled, isolated]), h, call.qkv)
        error = (call.out[0, isolated, h].double() - exact, own - exact, exact)
        checks.append(_worst(name, "isolated queries", [error], case.dtype))
    return [require(each) for each in checks], stats.density


def check_eight_bits(
    case: Case, variant: Variant, qkv: Tensors, generator: torch.Generator
) -> tuple[list[Check], float]:
    """As check_sample, of a call in 8 bits: against that in the inputs' precision with the same order and blocks."""
    config, layout, name = case.config_of(variant), case.layout(), str(variant)
    out, stats = rectified_attention(*qkv, layout, config, backend=variant.name, return_stats=True)
    same: dict[str, Any] = {"block_mask": stats.block_mask, "token_order": stats.token_order}
    plain = rectified_attention(*qkv, layout, config.replace(precision="inputs"), backend=variant.name, **same)
    error = _largest(out - plain) / _largest(plain)
    return [require(Check(name, "that in the inputs' precision", error, _EIGHT_BITS))], stats.density


# the error, SDPA's own error and the exact output of some queries, each [queries, D]
_Errors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _block_errors(call: _Call, h: int, n: int) -> _Errors:
    """Query block n of head h in float64, from the stats' choices."""
    stats, qkv = call.stats, call.qkv
    places = call.order[h].view(call.blocks.num_blocks, -1)  # [nb, b]
    mask, compensated = stats.block_mask[0, h, n], stats.compensated[0, h, n]
    queries, keys = places[n], torch.cat([places[mask].flatten(), call.blocks.isolated])
    got, (exact, own) = call.out[0, queries, h].double(), _attend(queries, keys, h, qkv)
    if call.config.rule.tail:
        q, k, v = (x[0, at, h].double() for x, at in zip(qkv, (queries, keys, keys), strict=True))
        k_blocks, v_blocks = (x[0, places[compensated], h].double() for x in qkv[1:])  # [blocks, b, D]
        slope = _slope(h, call, places) if call.config.rule.slope else q.new_zeros(q.shape[-1], q.shape[-1])
        scale, queries_tell = q.shape[-1] ** -0.5, call.config.rule.queries
        want = with_pooled_keys(q, k, v, k_blocks, v_blocks, slope, scale, queries_tell)
        return got - want, own - exact, want
    weights = stats.probability[0, h, n, :-1].double() * compensated
    r, v_mean = stats.r[0, h, n].double(), qkv[2][0, places, h].double().mean(1)  # [nb, D]
    want = r * exact + weights @ v_mean
    return got - want, r * (own - exact), want


def _attend(queries: torch.Tensor, keys: torch.Tensor, h: int, qkv: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some tokens of head h to others, in float64 and by SDPA in the inputs' dtype: [queries, D] twice."""
    q, k, v = (x[None, :, places, h] for x, places in zip(qkv, (queries, keys, keys), strict=True))  # [1, 1, n, D]
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    return exact[0, 0], scaled_dot_product_attention(q, k, v)[0, 0].double()


def _slope(h: int, call: _Call, places: torch.Tensor) -> torch.Tensor:
    """H of head h, float64 [D, D], from the stats' choices. places: [nb, b]."""
    q, k, v = (x[0, places, h].double() for x in call.qkv)  # [nb, b, D]
    mass = call.stats.probability[0, h, :, :-1].double() * call.stats.compensated[0, h]
    if not call.config.rule.queries:
        half_variance = q.mean(1).square() @ k.var(1, unbiased=False).T / (2 * q.shape[-1])
        mass *= half_variance.clamp(max=CAP).exp()
    weight = mass.sum(0) / mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
    apart = (k - k.mean(1, keepdim=True)) * (weight / k.shape[1])[:, None, None]
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


def _require_choices(call: _Call, oracle: SparseStats) -> None:
    """Stages 3 and 4 made the reference's choices, up to ties."""
    stats, config = call.stats, call.config
    estimate = oracle.probability[0].cpu()
    rows = [[critical_row(p, n, call.blocks, config) for n, p in enumerate(head)] for head in estimate]
    best = torch.stack([torch.stack(row) for row in rows])[None].to(stats.block_mask.device)  # [1, H, nb, nb]
    sizes, wanted = stats.block_mask.sum(-1), best.sum(-1)
    probability = oracle.probability[..., :-1]
    mass, most = ((probability * mask).sum(-1) for mask in (stats.block_mask, best))
    same = float((stats.compensated == oracle.compensated).float().mean())
    problem = ""
    if config.rule.choice == "error":
        budget = top_k_of(config, call.blocks.num_blocks) * call.blocks.num_blocks
        kept = int(stats.block_mask.sum((2, 3)).min())
        if kept < _SAME_CHOICES * budget or not bool(stats.block_mask.any(-1).all()):
            problem = f"{kept} critical blocks a head; allowed: {budget}, or a few less, and one or more a query block"
        held = float((best & stats.block_mask).sum() / best.sum().clamp(min=1)) if bool(best.any()) else 1.0
        if held < _SAME_CHOICES:
            problem = f"{held:.1%} of the critical blocks a query block; allowed: all that top_p and neighbours ask for"
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
        raise BenchError(f"{call.name}: got {problem}. Nothing was timed.")


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


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())
