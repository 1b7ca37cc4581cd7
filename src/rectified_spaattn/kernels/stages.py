"""The stages before attention one by one, for whoever wants to time them."""

from collections.abc import Callable
from functools import partial

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan
from .arrange import content_order
from .plan import BlockLists, compensate, make_plan, scores, select
from .tile import Tiled, tile


def before_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
) -> tuple[Tiled, Plan, BlockLists, dict[str, Callable[[], object]]]:
    """What `attend` needs, and the stages that made it, each as a function that runs it again on tensors of its own."""
    named: dict[str, Callable[[], object]] = {}
    token_order = None
    if layout.by_content:
        sort = partial(content_order, q, k, layout, scale)
        token_order = sort()
        named["order by content"] = sort
    tiled = tile(q, k, v, layout, text_valid, config.rectify, token_order)
    plan, lists = make_plan(tiled, layout, config, scale, None)
    critical, worthwhile, r = plan.block_mask.clone(), plan.compensated.clone(), plan.r.clone()
    logits, again = plan.probability.clone(), BlockLists(*(x.clone() for x in lists))
    bias = None if plan.tail is None else plan.tail.bias.clone()
    named |= {
        "tile + pool": partial(tile, q, k, v, layout, text_valid, config.rectify, token_order),
        "scores, gain": partial(scores, tiled, layout, config, scale, logits, worthwhile, bias),
        "select, lists, R": partial(select, layout, config, logits, critical, worthwhile, r, again, bias, given=False),
    }
    if config.rectify not in ("none", "row"):
        c = torch.empty_like(plan.c)
        named["C"] = partial(compensate, plan.probability, plan.compensated, tiled.pooled.v, c)
    return tiled, plan, lists, named
