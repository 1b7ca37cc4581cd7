"""FlashAttention-4's block-sparse forward between our kernels: tile and plan before, isolated keys, R and C after."""

from functools import partial

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan
from .call import Call, Stages, installed_version, why_no_kernels

PACKAGE = "flash-attn-4"


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
    from ..kernels.fa4 import listed_blocks
    from ..kernels.plan import make_plan
    from ..kernels.tile import tile

    layout = layout.on(q.device)
    tiled = tile(q, k, v, layout, text_valid, config.rectify, token_order)
    plan, lists = make_plan(tiled, layout, config, scale, block_mask)
    if layout.num_blocks:
        given = listed_blocks(tiled, lists, scale)
        # the tiled keys have done their work: their memory serves the output
        nothing = tiled.k.new_empty(0, tiled.k.shape[-1])
        tiled = tiled._replace(k=nothing, v=nothing)
    else:
        given = None
    out, _ = attend(tiled, lists, plan, layout, scale, given)
    return out, plan


def why_not(call: Call) -> str | None:
    reason = why_no_kernels(call)
    if reason is not None:
        return reason
    if installed_version(PACKAGE) is None:
        return f"{PACKAGE} is not installed (pip install --pre {PACKAGE})"
    if call.device.type != "cuda" or torch.version.hip is not None:
        return "FlashAttention-4 runs on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(call.device)
    if major != 9:
        why = ": on Blackwell it wants query blocks of 256" if major == 10 else ""
        return f"the GPU is sm_{major}{minor}, its block-sparse forward fits blocks of 128 on Hopper (sm_90){why}"
    if call.block_size != 128:
        return f"block_size {call.block_size}, it takes 128"
    return None


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
    from ..kernels.fa4 import listed_blocks
    from ..kernels.stages import before_attend

    layout = layout.on(q.device)
    tiled, plan, lists, named = before_attend(q, k, v, layout, config, text_valid, scale)
    given = listed_blocks(tiled, lists, scale)
    named["attend (FlashAttention-4)"] = partial(listed_blocks, tiled, lists, scale)
    named["isolated keys, rectify, un-reorder"] = partial(attend, tiled, lists, plan, layout, scale, given)
    return named
