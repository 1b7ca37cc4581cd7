"""Is it right? Everything that is timed is compared with float64 first.

The error budget comes from what scaled_dot_product_attention does on the same numbers in the same dtype: twice its
error, and rounding: one more in the dtype for R * sparse + C, and a few in float32, in which plans are made.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import SparseStats, rectified_attention
from ..config import Rectify, SparseConfig
from ..layout import TokenLayout
from ..method.select import top_k_of
from ..method.tail import CAP
from .baselines import BASELINES, sdpa
from .shapes import Case

_SAMPLED_BLOCKS = 8
_SMALL_SPARSITY = 0.8
_SAME_CHOICES = 0.99  # gains that equal their error up to rounding may fall on either side
_R_TOLERANCE = 1e-2


class BenchError(RuntimeError):
    """Something asked for cannot run here, or a result is wrong. Nothing was timed."""


class Checked(NamedTuple):
    """error, allowed: largest absolute error over the largest exact value."""

    name: str
    what: str
    error: float
    allowed: float


def config_at(sparsity: float, rectify: Rectify = "ipar+gapr") -> SparseConfig:
    """Exactly the nominal share of blocks, whatever the input."""
    return SparseConfig(sparsity=sparsity, top_p=0.0, neighbours=False, rectify=rectify)


def check_dense(case: Case, name: str) -> Checked:
    """A baseline against float64 on the small form of the case. Raises BenchError where it is wrong."""
    q, k, v = _small_inputs(case)
    return require(_against_sdpa(name, "dense attention", BASELINES[name].run(q, k, v), (q, k, v)))


def check_small(case: Case, name: str) -> list[Checked]:
    """A backend on the small form of the case: with every block kept, and at 80% against the reference backend.

    Raises BenchError where it is wrong.
    """
    small = case._replace(shape=case.shape.small())
    q, k, v = _small_inputs(case)
    layout = small.layout()
    full = rectified_attention(q, k, v, layout, config_at(0.0, case.rectify), backend=name)
    dense = require(_against_sdpa(name, "sparsity 0 is dense attention", full, (q, k, v)))

    q, k, v = (_blockwise(x, layout) for x in (q, k, v))
    config = config_at(_SMALL_SPARSITY, case.rectify)
    got, stats = rectified_attention(q, k, v, layout, config, backend=name, return_stats=True)
    want, oracle = rectified_attention(
        q, k, v, layout, config, block_mask=stats.block_mask, backend="reference", return_stats=True
    )
    _require_choices(name, stats, oracle, layout)
    same = (stats.compensated == oracle.compensated).all(-1)  # [1, H, nb]
    compared = _tokens_of(same, layout, _order_of(stats, layout))  # bool [1, S, H]
    budget = _against_sdpa(name, "", sdpa(q, k, v), (q, k, v)).allowed
    error = _largest((got.double() - want)[compared]) / _largest(want)
    return [dense, require(Checked(name, "80% sparse is the reference", error, budget))]


def check_sample(
    case: Case,
    name: str,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sparsity: float,
    generator: torch.Generator,
) -> tuple[list[Checked], float]:
    """A backend at full size: some random query blocks, and all isolated queries of one head, against float64.

    qkv: [1, S, H, D]; generator: on the CPU. Also returns the density. Raises BenchError where the backend is wrong.
    """
    q, k, v = qkv
    config = config_at(sparsity, case.rectify)
    out, stats = rectified_attention(q, k, v, case.layout(), config, backend=name, return_stats=True)
    layout = case.layout().on(case.device)
    heads, nb = stats.r.shape[1:]
    given_back = (stats.probability[..., :-1] * stats.compensated).sum(-1)
    off = _largest(stats.r - (1 - given_back))
    checks = [Checked(name, f"R at {sparsity:.4g}", off, _R_TOLERANCE)]

    errors = []
    for _ in range(_SAMPLED_BLOCKS):
        h, n = (int(torch.randint(high, (), generator=generator)) for high in (heads, nb))
        errors.append(_block_errors(h, n, out, stats, qkv, layout, case.rectify))
    checks.append(_worst(name, f"sampled blocks at {sparsity:.4g}", errors, case.dtype))
    if layout.isolated.numel():
        h = int(torch.randint(heads, (), generator=generator))
        every = torch.cat([layout.tiled, layout.isolated])
        exact, own = _attend(layout.isolated, every, h, qkv)
        error = (out[0, layout.isolated, h].double() - exact, own - exact, exact)
        checks.append(_worst(name, f"isolated queries at {sparsity:.4g}", [error], case.dtype))
    return [require(each) for each in checks], stats.density


# the error, SDPA's own error and the exact output of some queries, each [queries, D]
_Errors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _block_errors(
    h: int,
    n: int,
    out: torch.Tensor,
    stats: SparseStats,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: TokenLayout,
    rectify: Rectify,
) -> _Errors:
    """Query block n of head h in float64, from the stats' choices."""
    blocks = _order_of(stats, layout)[h].view(layout.num_blocks, layout.block_size)
    keys = torch.cat([blocks[stats.block_mask[0, h, n]].flatten(), layout.isolated])
    exact, own = _attend(blocks[n], keys, h, qkv)
    if rectify == "row":
        want = _with_pooled_keys(blocks[n], keys, blocks[stats.compensated[0, h, n]], h, qkv)
        return out[0, blocks[n], h].double() - want, own - exact, want
    given_back = stats.probability[0, h, n, :-1].double() * stats.compensated[0, h, n]
    v_mean = qkv[2][0, blocks.flatten(), h].double().view(*blocks.shape, -1).mean(1)  # [nb, D]
    r = stats.r[0, h, n].double()
    want = r * exact + given_back @ v_mean
    return out[0, blocks[n], h].double() - want, r * (own - exact), want


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, h: int, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some tokens of head h to others, in float64 and by SDPA in the inputs' dtype: [queries, D] twice."""
    q, k, v = (x[0, places, h] for x, places in zip(qkv, (queries, keys, keys), strict=True))
    own = scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    logits = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v.double(), own.double()


def _with_pooled_keys(
    queries: torch.Tensor,
    keys: torch.Tensor,
    pooled: torch.Tensor,
    h: int,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What "row" makes of some tokens of head h, float64 [queries, D]. pooled: places [blocks, b] of one key each."""
    scale = qkv[0].shape[-1] ** -0.5
    q, k, v = (x[0, places, h].double() for x, places in zip(qkv, (queries, keys, keys), strict=True))
    k_blocks, v_blocks = (x[0, pooled, h].double() for x in qkv[1:])  # [blocks, b, D]
    spread = scale**2 * k_blocks.var(1, unbiased=False) @ q.mean(0).square()
    added = math.log(pooled.shape[1]) + (spread / 2).clamp(max=CAP)
    logits = torch.cat([scale * q @ k.T, scale * q @ k_blocks.mean(1).T + added], 1)
    return logits.softmax(-1) @ torch.cat([v, v_blocks.mean(1)])


def _worst(name: str, what: str, errors: list[_Errors], dtype: torch.dtype) -> Checked:
    error, own, want = (max(map(_largest, part)) for part in zip(*errors, strict=True))
    return Checked(name, what, error / want, _budget(own / want, dtype))


def _against_sdpa(
    name: str, what: str, got: torch.Tensor, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> Checked:
    exact = sdpa(*(x.double() for x in qkv))
    error, own = (_largest(x.double() - exact) / _largest(exact) for x in (got, sdpa(*qkv)))
    return Checked(name, what, error, _budget(own, qkv[0].dtype))


def _budget(sdpa_error: float, dtype: torch.dtype) -> float:
    return 2 * sdpa_error + torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def _require_choices(name: str, stats: SparseStats, oracle: SparseStats, layout: TokenLayout) -> None:
    """Stages 3 and 4 made the reference's choices, up to ties."""
    kept = top_k_of(_SMALL_SPARSITY, layout.num_blocks)
    counts = stats.block_mask.sum(-1)
    if not bool((counts == kept).all()):
        raise BenchError(
            f"{name}: got {int(counts.min())} to {int(counts.max())} critical blocks a query block; "
            f"allowed: {kept}. Nothing was timed."
        )
    probability = oracle.probability[..., :-1]
    best = probability.topk(kept).values.sum(-1)
    if not bool(((probability * stats.block_mask).sum(-1) >= _SAME_CHOICES * best).all()):
        raise BenchError(
            f"{name}: got critical blocks that hold less attention mass than others; allowed: the {kept} with the "
            "most. Nothing was timed."
        )
    same = float((stats.compensated == oracle.compensated).float().mean())
    if not same >= _SAME_CHOICES:
        raise BenchError(
            f"{name}: got {same:.1%} of the blocks compensated as the reference does; allowed: {_SAME_CHOICES:.0%} "
            "or more. Nothing was timed."
        )


def require(checked: Checked) -> Checked:
    """Raises BenchError where the error is above what is allowed, or not a number."""
    if not checked.error <= checked.allowed:
        raise BenchError(
            f"{checked.name}, {checked.what}: got a relative error of {checked.error:.3g}; allowed: "
            f"{checked.allowed:.3g}. Nothing was timed."
        )
    return checked


def _small_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(case.device).manual_seed(0)
    return case._replace(shape=case.shape.small()).inputs(generator)


def _blockwise(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """x [1, S, H, D] with tokens of a block near their mean, so that some blocks are worth compensating."""
    layout = layout.on(x.device)
    first = layout.tiled.view(layout.num_blocks, layout.block_size)[:, 0]
    common = x[:, first].repeat_interleave(layout.block_size, dim=1)
    out = x.clone()
    out[:, layout.tiled] = common + 0.5 * x[:, layout.tiled]
    return out


def _order_of(stats: SparseStats, layout: TokenLayout) -> torch.Tensor:
    """int64 [H, nb * b]: places of the tiled tokens of the one sample, block after block."""
    if stats.token_order is not None:
        return stats.token_order[0]
    return layout.on(stats.r.device).tiled.expand(stats.r.shape[1], -1)


def _tokens_of(same: torch.Tensor, layout: TokenLayout, order: torch.Tensor) -> torch.Tensor:
    """bool [1, H, nb] -> bool [1, S, H]: the tokens of these query blocks, and every isolated one."""
    tokens = same.new_ones(1, same.shape[1], layout.sequence)
    tokens.scatter_(2, order[None], same.repeat_interleave(layout.block_size, dim=-1))
    return tokens.transpose(1, 2)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())
