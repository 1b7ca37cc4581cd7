"""The stages of one call, each as a function that runs it again: for timing them one by one."""

from collections.abc import Callable
from functools import partial

import torch

from ...backends import BACKENDS, fa4, triton
from ...method.inputs import Inputs
from ...method.plan import Choices
from .shapes import Case, Tensors

Stages = dict[str, Callable[[], object]]


def stages_of(backend: str, case: Case, qkv: Tensors) -> Stages:
    """By name, in their order: sorting (where blocks are by content), planning, attention."""
    text = torch.ones(1, case.shape.text, dtype=torch.bool, device=case.device)
    inputs = Inputs(*qkv, case.blocks(), case.config, text, case.shape.head_dim**-0.5)
    stages: Stages = {}
    row = BACKENDS[backend]
    if inputs.blocks.by_content:
        stages["order by content"] = partial(row.sort, inputs)
        inputs = inputs._replace(token_order=row.sort(inputs))
    choices, prepared = row.plan(inputs)
    if not isinstance(prepared, triton.Prepared):  # not by kernels of ours
        return stages | {"plan": partial(row.plan, inputs), "attend": partial(row.attend, inputs, prepared)}
    stages |= _kernels_before_attend(inputs, prepared, choices)
    if backend != "fa4":
        return stages | {"attend, rectify, un-reorder": partial(row.attend, inputs, prepared)}
    from ...backends.triton.attend import attend

    listed = fa4.listed_blocks(inputs, prepared)
    stages["attend (FlashAttention-4)"] = partial(fa4.listed_blocks, inputs, prepared)
    return stages | {"isolated keys, rectify, un-reorder": partial(attend, inputs, prepared, listed)}


def _kernels_before_attend(inputs: Inputs, prepared: triton.Prepared, choices: Choices) -> Stages:
    """On tensors of their own, where a stage works in place."""
    from ...backends.triton.plan import compensate, empty, scores, select
    from ...backends.triton.tile import tile

    tiled, rule = prepared.tiled, inputs.config.rule
    scratch, bias, lists = empty(inputs, tiled)
    residual = scores(inputs, tiled, scratch, bias)
    stages: Stages = {
        "tile + pool": partial(tile, inputs),
        "scores, gain": partial(scores, inputs, tiled, scratch, bias),
        "select, lists, R": partial(select, inputs, scratch, bias, lists, residual),
    }
    if rule.gate != "none" and not rule.tail:
        c = torch.empty_like(prepared.rectification.c)
        stages["C"] = partial(compensate, choices, tiled.pooled.v, c)
    if rule.slope and prepared.rectification.tail is not None:
        from ...backends.triton.slope import slope

        stages["slope"] = partial(slope, inputs, tiled, choices, prepared.rectification.tail.bias)
    return stages
