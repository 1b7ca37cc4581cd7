"""rectified_attention: checks a call, picks the backend and runs it."""

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch

from . import ops
from .backends import Call, choose
from .config import SparseConfig, check_has_places
from .layout import TokenLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class SparseStats:
    """What one call did.

    block_mask   bool [B, H, nb, nb], the critical blocks
    compensated  bool [B, H, nb, nb], the dropped blocks that got their pooled contribution back
    probability  [B, H, nb, nb + 1], the estimated full attention; the last column is all isolated tokens
    r            [B, H, nb], the full-attention mass that was not compensated
    density      computed query-key pairs over all pairs of queries and valid keys, isolated ones counted, "row"'s
                 pooled keys not; reading it waits for the device, reading `device_density`, the same as a scalar
                 tensor, does not
    backend      name
    token_order  int64 [B, H, nb * b], places in the sequence of the tiled tokens, block after block, where every head
                 has an order of its own (order "content"); None where `layout.tiled` holds for all
    """

    block_mask: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor
    device_density: torch.Tensor
    backend: str
    token_order: torch.Tensor | None = None

    @property
    def density(self) -> float:
        return float(self.device_density)


@overload
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
    backend: str = "auto",
    return_stats: Literal[False] = False,
) -> torch.Tensor: ...


@overload
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
    backend: str = "auto",
    return_stats: Literal[True],
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
    backend: str = "auto",
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SparseStats]:
    """Block-sparse attention over video tokens, rectified (arXiv 2511.19835). Tokens stay in the model's order.

    q, k, v: [B, S, H, D], any strides, float16, bfloat16 or float32 (backend="reference" takes float64 too).
    layout: which of the S tokens are video (raster order) and which are text; block size and order come from it.
    text_mask: bool [B, text], True where a text token is valid; None: all are. Invalid ones are never attended to.
    scale: factor of the logits, D**-0.5 by default.
    block_mask: bool [B, H, nb, nb], critical blocks chosen by the caller in place of stage 3.
    backend: "auto", "fa4", "triton", "torch" or "reference"; `rectified-spaattn doctor` tells which can run here.

    Returns out [B, S, H, D] in q's dtype (float64 from "reference"), and SparseStats with return_stats=True.
    Raises TypeError or ValueError for input of the wrong kind, RuntimeError where the named backend cannot run it.
    """
    config = SparseConfig() if config is None else config
    _check_types(layout, config)
    check_has_places(layout.curve, config.neighbours, config.first_frame)
    _check_tensors(q, k, v, layout, backend)
    _check_mask("text_mask", text_mask, (q.shape[0], layout.text), q)
    square = (q.shape[0], q.shape[2], layout.num_blocks, layout.num_blocks)
    _check_mask("block_mask", block_mask, square, q)
    scale = q.shape[-1] ** -0.5 if scale is None else _checked_scale(scale)
    backend = choose(backend, Call(q.device, q.dtype, q.shape[-1], layout.block_size, layout.num_blocks))
    out, critical, compensated, probability, r, token_order = ops.attention(
        q,
        k,
        v,
        text_mask,
        block_mask,
        list(layout.grid),
        layout.text,
        layout.text_first,
        layout.block_size,
        layout.curve,
        float(config.sparsity),
        float(config.top_p),
        config.rectify,
        config.neighbours,
        config.first_frame,
        scale,
        backend,
    )
    if not return_stats:
        return out
    return out, SparseStats(
        block_mask=critical,
        compensated=compensated,
        probability=probability,
        r=r,
        device_density=density(critical, layout, text_mask),
        backend=backend,
        token_order=token_order if layout.by_content else None,
    )


def density(block_mask: torch.Tensor, layout: TokenLayout, text_mask: torch.Tensor | None) -> torch.Tensor:
    """Computed query-key pairs over all pairs of the S queries and the valid keys; a float64 scalar tensor, no sync.

    block_mask: bool [B, H, nb, nb]; text_mask: bool [B, text] or None.
    """
    batch, heads, num_blocks, _ = block_mask.shape
    if text_mask is None:
        text = torch.full((batch,), layout.text, dtype=torch.float64, device=block_mask.device)
    else:
        text = text_mask.sum(1).double()
    alone, tiled = layout.leftover + text, num_blocks * layout.block_size  # [B] valid isolated keys
    blocks = block_mask.sum((1, 2, 3)).double() / heads * layout.block_size**2
    computed = blocks + tiled * alone + layout.isolated.numel() * (tiled + alone)
    return (computed / (layout.sequence * (tiled + alone))).mean()


def _check_types(layout: TokenLayout, config: SparseConfig) -> None:
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"layout: got {type(layout).__name__}; allowed: a TokenLayout. Make one with TokenLayout.build."
        )
    if not isinstance(config, SparseConfig):
        raise TypeError(
            f"config: got {type(config).__name__}; allowed: a SparseConfig. From a dict: SparseConfig.from_dict(...)."
        )


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, backend: str) -> None:
    allowed = (*DTYPES, torch.float64) if backend == "reference" else DTYPES
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; allowed: a torch.Tensor [B, S, H, D].")
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: four dimensions [B, S, H, D].")
        if x.dtype not in allowed:
            raise TypeError(f"{name}: got {x.dtype}; allowed: {', '.join(map(str, allowed))}. Cast with .to(dtype).")
        if x.shape != q.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: that of q, {tuple(q.shape)}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name}: got {x.dtype} on {x.device}; allowed: q's {q.dtype} on {q.device}.")
    if 0 in q.shape:
        raise ValueError(f"q, k, v: got the empty shape {tuple(q.shape)}; allowed: B, S, H and D of 1 or more.")
    if q.shape[1] != layout.sequence:
        t, h, w = layout.grid
        raise ValueError(
            f"q, k, v: got S = {q.shape[1]} tokens; allowed by the layout: {t}*{h}*{w} video + {layout.text} text = "
            f"{layout.sequence}. Build the layout with the grid after patching and the padded text length; "
            "the shape must be [B, S, H, D], not [B, H, S, D]."
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


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: got {scale!r}; allowed: a finite positive number, or None for D**-0.5.")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale: got {scale!r}; allowed: a finite positive number, or None for D**-0.5.")
    return float(scale)
