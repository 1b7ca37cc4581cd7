"""Stage 3: the critical blocks of every query block."""

import math

import torch

from ..config import SparseConfig
from ..layout import TokenLayout


def top_k_of(sparsity: float, num_blocks: int) -> int:
    """max(1, floor((1 - sparsity) * nb)) in double precision, literally: 0.8 of 10 blocks keeps 1, as 1 - 0.8 < 0.2."""
    return max(1, math.floor((1.0 - sparsity) * num_blocks))


def select(probability: torch.Tensor, layout: TokenLayout, config: SparseConfig) -> torch.Tensor:
    """bool [B, H, nb, nb]: the union of top-k, top-p, 3-D neighbours and (where asked for) first-frame blocks.

    probability: [B, H, nb, nb + 1] with the isolated mass last. Equal probabilities keep the lower block index first.
    """
    num_blocks = layout.num_blocks
    to_blocks, isolated = probability[..., :num_blocks], probability[..., num_blocks:]
    ranked, block = to_blocks.sort(dim=-1, descending=True, stable=True)
    # [B, H, nb, 1]: how many blocks top-p asks for; none where the isolated tokens hold top_p already
    reached = isolated + torch.cat([torch.zeros_like(isolated), ranked.cumsum(-1)[..., :-1]], dim=-1)
    for_top_p = (reached < config.top_p).sum(-1, keepdim=True)
    keep = for_top_p.clamp(min=top_k_of(config.sparsity, num_blocks))
    rank = torch.arange(num_blocks, device=probability.device)
    critical = torch.zeros_like(to_blocks, dtype=torch.bool).scatter_(-1, block, rank < keep)
    if config.neighbours:
        critical |= layout.neighbours
    if config.first_frame:
        critical |= layout.first_frame[:, None] & layout.first_frame[None, :]
    return critical
