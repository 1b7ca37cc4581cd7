"""Stage 3: the critical blocks of every query block."""

import math

import torch

from ..config import SparseConfig
from ..orders import Blocks


def top_k_of(config: SparseConfig, num_blocks: int) -> int:
    """How many blocks are kept at least: max(1, floor((1 - sparsity) * nb)), or all where top_p asks for all the mass.

    In double precision, literally: 0.8 of 10 blocks keeps 1, as 1 - 0.8 < 0.2.
    """
    if config.top_p == 1:  # a sum of rounded probabilities can reach 1 before the last block
        return num_blocks
    return max(1, math.floor((1.0 - config.sparsity) * num_blocks))


def select(probability: torch.Tensor, blocks: Blocks, config: SparseConfig) -> torch.Tensor:
    """bool [B, H, nb, nb]: the union of top-k, top-p, 3-D neighbours and (where asked for) first-frame blocks.

    probability: [B, H, nb, nb + 1] with the isolated mass last. Equal probabilities keep the lower block index first.
    Where an estimate is not finite (an infinite query or key), every block is kept, so that the rows of a block which
    full attention would compute are computed.
    """
    num_blocks = blocks.num_blocks
    to_blocks, isolated = probability[..., :num_blocks], probability[..., num_blocks:]
    ranked, block = to_blocks.sort(dim=-1, descending=True, stable=True)
    # [B, H, nb, 1]: how many blocks top-p asks for; none where the isolated tokens hold top_p already
    reached = isolated + torch.cat([torch.zeros_like(isolated), ranked.cumsum(-1)[..., :-1]], dim=-1)
    for_top_p = (reached < config.top_p).sum(-1, keepdim=True)
    keep = for_top_p.clamp(min=top_k_of(config, num_blocks))
    rank = torch.arange(num_blocks, device=probability.device)
    critical = torch.zeros_like(to_blocks, dtype=torch.bool).scatter_(-1, block, rank < keep)
    critical |= ~probability.sum(-1, keepdim=True).isfinite()
    if config.neighbours:
        critical |= blocks.neighbours
    if config.first_frame:
        critical |= blocks.first_frame[:, None] & blocks.first_frame[None, :]
    return critical
