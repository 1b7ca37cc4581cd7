"""FlashAttention-4's block-sparse forward between our kernels: tile and plan before, isolated keys, R and C after."""

import torch

from ..method.apart import attend_apart
from ..method.inputs import Inputs
from . import triton
from .calls import Call, installed_version, why_not_8_bits

PACKAGE = "flash-attn-4"


def why_not(call: Call) -> str | None:
    reason = triton.why_not(call)
    if reason is not None:
        return reason
    reason = why_not_8_bits(call)
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
    if call.head_dim > 128:
        return f"head_dim {call.head_dim}, its tiles of keys fit blocks of 128 up to head_dim 128"
    return None


def run(inputs: Inputs, prepared: "triton.Prepared") -> torch.Tensor:
    """out [B, S, H, D], without waiting for the device. Uses up the tiled keys and values of `prepared`."""
    from .triton.attend import attend

    if not inputs.blocks.num_blocks:
        return triton.run(inputs, prepared)
    partial = listed_blocks(inputs, prepared)
    # the tiled keys have done their work: their memory serves the output, whoever still holds them
    tiled = prepared.tiled
    for x in (tiled.k, tiled.v):
        x.untyped_storage().resize_(0)
    nothing = tiled.k.new_empty(0, tiled.k.shape[-1])
    out, _ = attend(inputs, prepared._replace(tiled=tiled._replace(k=nothing, v=nothing)), partial)
    attend_apart(inputs, out)
    return out


def listed_blocks(inputs: Inputs, prepared: "triton.Prepared") -> "triton.Partial":
    """Attention of every query block, isolated ones included, over its listed key blocks alone.

    All of these are whole, so FlashAttention-4 masks nothing; isolated keys are joined later.
    """
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    tiled, lists = prepared.tiled, prepared.lists
    none = torch.zeros_like(lists.counts)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=lists.counts,
        full_block_idx=lists.indices,
        block_size=(128, 128),
    )
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (tiled.q, tiled.k, tiled.v)),  # [B, rows, H or Hk, D]
        softmax_scale=inputs.scale,
        block_sparse_tensors=blocks,
        return_lse=True,
    )[:2]
    return triton.Partial(out.transpose(1, 2), lse)


BACKEND = triton.BACKEND._replace(why_not=why_not, attend=run)
