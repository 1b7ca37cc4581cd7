"""The listed blocks of stage 6 by FlashAttention-4's block-sparse forward."""

import torch
from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

from .attend import Partial
from .plan import BlockLists
from .tile import Tiled


def listed_blocks(tiled: Tiled, lists: BlockLists, scale: float) -> Partial:
    """Attention of every query block, isolated ones included, over its listed key blocks alone.

    All of these are whole, so FlashAttention-4 masks nothing; isolated keys are joined later by `attend`.
    """
    none = torch.zeros_like(lists.counts)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=lists.counts,
        full_block_idx=lists.indices,
        block_size=(128, 128),
    )
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (tiled.q, tiled.k, tiled.v)),  # [B, rows, H, D]
        softmax_scale=scale,
        block_sparse_tensors=blocks,
        return_lse=True,
    )[:2]
    return Partial(out.transpose(1, 2), lse)
