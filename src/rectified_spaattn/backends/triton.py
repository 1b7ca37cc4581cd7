"""The paper's kernels in Triton: index lists, rectification and un-reordering fused into attention."""

from functools import partial

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan
from .call import Call, Stages, why_no_kernels


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
    block_mask: torch.Tensor | None,
    token_order: torch.Tensor | None,
) -> tuple[torch.Tensor, Plan]:
    """q, k, v: [B, S, H, D]; text_valid: bool [B, text]; block_mask: bool [B, H, nb, nb] or None;
    token_order: int64 [B, H, nb * b] or None.

    Returns out [B, S, H, D] and the plan, without waiting for the device. A query block left without any key gives NaN
    ("row" leaves none without: a dropped block is a key).
    """
    from ..kernels.attend import attend
    from ..kernels.plan import make_plan
    from ..kernels.tile import tile

    layout = layout.on(q.device)
    tiled = tile(q, k, v, layout, text_valid, config.rectify, token_order)
    plan, lists = make_plan(tiled, layout, config, scale, block_mask)
    out, _ = attend(tiled, lists, plan, layout, scale)
    return out, plan


def why_not(call: Call) -> str | None:
    return why_no_kernels(call)


def stages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
) -> Stages:
    """The stages of `run` by name; calling one runs it again on what came before it."""
    from ..kernels.attend import attend
    from ..kernels.stages import before_attend

    layout = layout.on(q.device)
    tiled, plan, lists, named = before_attend(q, k, v, layout, config, text_valid, scale)
    named["attend, rectify, un-reorder"] = partial(attend, tiled, lists, plan, layout, scale)
    return named
