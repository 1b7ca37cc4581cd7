"""rectified_attention: checks a call, picks the backend and runs it. plan and attend: its two halves."""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

import torch

from . import ops
from .backends import BACKENDS, Call, choose
from .config import SparseConfig
from .layout import TokenLayout
from .method.density import density
from .method.probe import Probe
from .orders import blocks_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DEFAULT = SparseConfig()


@dataclass(frozen=True, kw_only=True)
class SparseStats:
    """What one call did.

    block_mask   bool [B, H, nb, nb], the critical blocks
    compensated  bool [B, H, nb, nb], the dropped blocks that got their pooled contribution back
    probability  [B, H, nb, nb + 1], the estimated full attention; the last column is all isolated tokens
    r            [B, H, nb], the full-attention mass that was not compensated
    density      executed query-key pairs over all pairs of full attention, as method.density counts them; reading it
                 waits for the device, reading `device_density`, the same as a float32 scalar tensor, does not
    backend      name of what attended
    sorting      name of what sorted the tokens: "triton" or "torch"; empty where nothing did
    token_order  int64 [B, Hk, nb * b], places in the sequence of the tiled tokens, block after block, where every key
                 head has an order of its own, which the query heads that share it share (order "content"); None where
                 `blocks_of(layout, config).tiled` holds for all
    probe        what config.probe_rows rows of every head got wrong; None without such rows
    """

    block_mask: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor
    device_density: torch.Tensor
    backend: str
    sorting: str
    token_order: torch.Tensor | None = None
    probe: Probe | None = None

    @property
    def density(self) -> float:
        return float(self.device_density)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was decided for a call, to be used by later calls of the same shape.

    kept         int16 or int32 [B, H, nb, K]: the critical blocks of every query block, ascending, -1 behind them; K is
                 the most that any query block keeps
    token_order  int32 [B, Hk, nb * b], as in SparseStats, or None
    shape        (B, S, H, D) of the queries; key_heads: Hk
    text_mask, scale, backend: as rectified_attention took them

    Pooled keys and values, gain, R and C are no part of it: `attend` takes them anew.
    """

    layout: TokenLayout
    config: SparseConfig
    kept: torch.Tensor
    token_order: torch.Tensor | None
    shape: tuple[int, ...]
    key_heads: int
    text_mask: torch.Tensor | None
    scale: float
    backend: str

    @property
    def block_mask(self) -> torch.Tensor:
        """bool [B, H, nb, nb]"""
        nb = self.kept.shape[2]
        mask = torch.zeros(*self.kept.shape[:3], nb + 1, dtype=torch.bool, device=self.kept.device)
        index = self.kept.long()
        return mask.scatter_(-1, index.where(index >= 0, nb), True)[..., :nb]

    @property
    def nbytes(self) -> int:
        """Device memory that the plan holds, in bytes."""
        return sum(x.nbytes for x in (self.kept, self.token_order, self.text_mask) if x is not None)


class _Options(TypedDict, total=False):
    """The keyword arguments of rectified_attention, for its overloads."""

    text_mask: torch.Tensor | None
    scale: float | None
    block_mask: torch.Tensor | None
    token_order: torch.Tensor | None
    top_k: torch.Tensor | None
    backend: str


@overload
def rectified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...


@overload
def rectified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, SparseStats]: ...


def rectified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig | None = None,
    *,
    text_mask: torch.Tensor | None = None,
    scale: float | None = None,
    block_mask: torch.Tensor | None = None,
    token_order: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SparseStats]:
    """Block-sparse attention over video tokens, rectified (arXiv 2511.19835). Tokens stay in the model's order.

    q: [B, S, H, D]; k, v: [B, S, Hk, D], H a multiple of Hk: head h of q attends to head h // (H // Hk) of k and v. Any
    strides, float16, bfloat16 or float32 (backend="reference" takes float64 too). Under autocast they are cast to its
    dtype, as scaled_dot_product_attention casts them.
    layout: which of the S tokens can be tiled, and which stand alone. config: how; SparseConfig() by default.
    text_mask: bool [B, text], True where a token that stands alone is valid, in the order of the sequence; None: all
    are. Invalid ones are never attended to.
    scale: factor of the logits, D**-0.5 by default.
    block_mask: bool [B, H, nb, nb], critical blocks chosen by the caller in place of stage 3.
    token_order: integers [B, Hk, nb * b], an order of the tiled tokens in place of the sorting, for order "content".
    top_k: float [B, H], at least how many blocks a row of each head keeps, in place of what config.sparsity says: whole
    ones in every row, or, where the mode chooses by error, as many on average. A tolerance needs it: `enable` finds it.
    backend: "auto", "fa4", "triton", "torch" or "reference"; `rectified-spaattn doctor` tells which can run here.

    Returns out [B, S, H, D] in q's dtype (float64 from "reference"), and SparseStats with return_stats=True.
    Raises TypeError or ValueError for input of the wrong kind, RuntimeError where the named backend cannot run it, or
    where a gradient would be asked for: it is for inference.
    """
    config = _DEFAULT if config is None else config
    q, k, v = _checked(q, k, v, layout, config, backend)
    _check_mask("text_mask", text_mask, (q.shape[0], layout.text), q)
    nb = layout.video // config.block_size
    _check_mask("block_mask", block_mask, (q.shape[0], q.shape[2], nb, nb), q)
    _check_order(token_order, (q.shape[0], k.shape[2], nb * config.block_size), q, config)
    _check_top_k(top_k, block_mask, q, config)
    name = choose(backend, Call(q.device, q.dtype, q.shape[-1], config.block_size, nb, config.precision))
    scale = _scale(scale, q)
    out, critical, compensated, probability, r, order = ops.attention(
        q, k, v, text_mask, block_mask, token_order, top_k, layout.key, config.key, scale, name
    )
    if not return_stats:
        return out
    own_order = order if config.by_content else None
    probed = None
    if config.probe_rows:
        rows = (text_mask, own_order, layout.key, config.key, scale, config.probe_rows)
        probed = Probe(*ops.probe(q, k, v, out, *rows))
    return out, SparseStats(
        block_mask=critical,
        compensated=compensated,
        probability=probability,
        r=r,
        device_density=density(critical, layout, config, text_mask),
        backend=name,
        sorting=BACKENDS[name].sorting if config.by_content and token_order is None else "",
        token_order=own_order,
        probe=probed,
    )


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig | None = None,
    *,
    text_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Plan:
    """The order and the critical blocks that rectified_attention would choose for the same arguments.

    Waits for the device, once. Raises what rectified_attention raises.
    """
    config = _DEFAULT if config is None else config
    q, k, v = _checked(q, k, v, layout, config, backend)
    _check_mask("text_mask", text_mask, (q.shape[0], layout.text), q)
    nb = layout.video // config.block_size
    _check_top_k(None, None, q, config)
    name = choose(backend, Call(q.device, q.dtype, q.shape[-1], config.block_size, nb, config.precision))
    scale = _scale(scale, q)
    mask, order = ops.plan(q, k, v, text_mask, layout.key, config.key, scale, name)
    counts = mask.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    # the kept blocks first, each kind ascending
    ranked = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    kept = ranked.where(torch.arange(most, device=q.device) < counts[..., None], -1)
    return Plan(
        layout=layout,
        config=config,
        kept=kept.to(torch.int16 if nb <= torch.iinfo(torch.int16).max else torch.int32),
        token_order=order.int() if config.by_content else None,
        shape=tuple(q.shape),
        key_heads=k.shape[2],
        text_mask=text_mask,
        scale=scale,
        backend=name,
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
    """rectified_attention with the order and the critical blocks of a plan; all else is taken from q, k, v anew.

    q: [B, S, H, D] of the plan's shape, on its device; k, v: [B, S, Hk, D]; maybe of a later step. Returns out
    [B, S, H, D]. Raises ValueError for another shape or device.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}; allowed: what plan(q, k, v, layout, config) gave.")
    if isinstance(q, torch.Tensor) and (tuple(q.shape) != plan.shape or q.device != plan.kept.device):
        raise ValueError(
            f"q: got shape {tuple(q.shape)} on {q.device}; allowed by the plan: {plan.shape} on {plan.kept.device}. "
            "Make a plan for these tensors."
        )
    if isinstance(k, torch.Tensor) and k.ndim == 4 and k.shape[2] != plan.key_heads:
        raise ValueError(
            f"k: got {k.shape[2]} heads; allowed by the plan: {plan.key_heads}. Make a plan for these tensors."
        )
    return rectified_attention(
        q,
        k,
        v,
        plan.layout,
        plan.config,
        text_mask=plan.text_mask,
        scale=plan.scale,
        block_mask=plan.block_mask,
        token_order=plan.token_order,
        backend=plan.backend,
    )


def percentiles(errors: torch.Tensor) -> tuple[float, float]:
    """Median and 99th percentile of the finite ones among errors of heads, [n] on the CPU; NaN without any."""
    finite = errors[errors.isfinite()].sort().values
    if not len(finite):
        return math.nan, math.nan
    return finite[(len(finite) - 1) // 2].item(), finite[math.ceil(0.99 * (len(finite) - 1))].item()


def _checked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, config: SparseConfig, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, cast where autocast would."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"layout: got {type(layout).__name__}; allowed: a TokenLayout. Make one with TokenLayout.build."
        )
    if not isinstance(config, SparseConfig):
        raise TypeError(
            f"config: got {type(config).__name__}; allowed: a SparseConfig. From a dict: SparseConfig.from_dict(...)."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; allowed: a torch.Tensor [B, S, H, D].")
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: four dimensions [B, S, H, D].")
    if backend != "reference" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype in DTYPES else x for x in (q, k, v))
    _check_tensors(q, k, v, (*DTYPES, torch.float64) if backend == "reference" else DTYPES)
    if q.shape[1] != layout.sequence:
        raise ValueError(
            f"q, k, v: got S = {q.shape[1]} tokens; allowed by the layout: {layout}. Build the layout with the grid "
            "after patching and the padded text length; the shape must be [B, S, H, D], not [B, H, S, D]."
        )
    if config.precision == "auto":
        raise ValueError(
            "precision: got 'auto' for a single call; allowed: 'inputs', 'int8-qk' or 'fp8', as earlier calls decide. "
            "rsa.enable(pipe, precision='auto') keeps what they measured."
        )
    if layout.grid is None:
        blocks_of(layout, config)  # says which orders need a grid
    return q, k, v


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in allowed:
            raise TypeError(f"{name}: got {x.dtype}; allowed: {', '.join(map(str, allowed))}. Cast with .to(dtype).")
        if (*x.shape[:2], x.shape[3]) != (*q.shape[:2], q.shape[3]):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; allowed: that of q, {tuple(q.shape)}, or fewer heads."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name}: got {x.dtype} on {x.device}; allowed: q's {q.dtype} on {q.device}.")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"{name}: got a tensor that requires a gradient; sparse attention is for inference and has none. "
                "Call it under torch.no_grad() or torch.inference_mode(), or train with full attention."
            )
    for x in (q, k):
        if 0 in x.shape:
            raise ValueError(f"q, k, v: got the empty shape {tuple(x.shape)}; allowed: B, S, H and D of 1 or more.")
    if q.shape[2] % k.shape[2] or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"k, v: got {k.shape[2]} and {v.shape[2]} heads for {q.shape[2]} of q; allowed: as many of k as of v, a "
            f"number that divides {q.shape[2]} (grouped-query attention: each serves as many of q, in their order)."
        )


def _check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, ...], q: torch.Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{name}: got {got}; allowed: a bool tensor {list(shape)}. Cast with .bool().")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}; allowed: {shape}.")
    if mask.device != q.device:
        raise ValueError(f"{name}: got a tensor on {mask.device}; allowed: q's device, {q.device}.")


def _check_order(order: torch.Tensor | None, shape: tuple[int, ...], q: torch.Tensor, config: SparseConfig) -> None:
    if order is None:
        return
    if not config.by_content:
        raise ValueError(f"token_order: got one with order={config.order!r}; allowed: None, or order='content'.")
    if not isinstance(order, torch.Tensor) or order.dtype not in (torch.int32, torch.int64):
        got = order.dtype if isinstance(order, torch.Tensor) else type(order).__name__
        raise TypeError(f"token_order: got {got}; allowed: an int32 or int64 tensor {list(shape)}.")
    if tuple(order.shape) != shape or order.device != q.device:
        raise ValueError(
            f"token_order: got shape {tuple(order.shape)} on {order.device}; allowed: {shape} on {q.device}."
        )


def _check_top_k(
    top_k: torch.Tensor | None, block_mask: torch.Tensor | None, q: torch.Tensor, config: SparseConfig
) -> None:
    shape = (q.shape[0], q.shape[2])
    if top_k is None:
        if config.tolerance is not None and block_mask is None:
            raise ValueError(
                f"tolerance: got {config.tolerance} for a single call; allowed: None, or top_k with it, as a tolerance "
                "is held from the errors of calls before. rsa.enable(pipe, tolerance=...) keeps them."
            )
        return
    if block_mask is not None:
        raise ValueError("top_k: got one together with a block_mask; allowed: one of them.")
    if not isinstance(top_k, torch.Tensor) or not top_k.is_floating_point():
        got = top_k.dtype if isinstance(top_k, torch.Tensor) else type(top_k).__name__
        raise TypeError(f"top_k: got {got}; allowed: a floating-point tensor {list(shape)}, blocks a row.")
    if tuple(top_k.shape) != shape or top_k.device != q.device:
        raise ValueError(f"top_k: got shape {tuple(top_k.shape)} on {top_k.device}; allowed: {shape} on {q.device}.")


def _scale(scale: float | None, q: torch.Tensor) -> float:
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: got {scale!r}; allowed: a finite positive number, or None for D**-0.5.")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale: got {scale!r}; allowed: a finite positive number, or None for D**-0.5.")
    return float(scale)
