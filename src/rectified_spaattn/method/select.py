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


def select(
    probability: torch.Tensor, blocks: Blocks, config: SparseConfig, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [B, H, nb, nb]: the union of top-k, top-p, 3-D neighbours and (where asked for) first-frame blocks.

    probability: [B, H, nb, nb + 1] with the isolated mass last. Equal probabilities keep the lower block index first.
    residual: [B, H, nb, nb], in place of top-k by probability: see `largest`.
    Where an estimate is not finite (an infinite query or key), every block is kept, so that the rows of a block which
    full attention would compute are computed.
    """
    num_blocks = blocks.num_blocks
    to_blocks, isolated = probability[..., :num_blocks], probability[..., num_blocks:]
    ranked, block = to_blocks.sort(dim=-1, descending=True, stable=True)
    # [B, H, nb, 1]: how many blocks top-p asks for; none where the isolated tokens hold top_p already
    reached = isolated + torch.cat([torch.zeros_like(isolated), ranked.cumsum(-1)[..., :-1]], dim=-1)
    keep = (reached < config.top_p).sum(-1, keepdim=True)
    top_k = top_k_of(config, num_blocks)
    if residual is None:
        keep = keep.clamp(min=top_k)
    rank = torch.arange(num_blocks, device=probability.device)
    critical = torch.zeros_like(to_blocks, dtype=torch.bool).scatter_(-1, block, rank < keep)
    if residual is not None:
        critical |= largest(residual, top_k * num_blocks)
    critical |= ~probability.sum(-1, keepdim=True).isfinite()
    if config.neighbours:
        critical |= blocks.neighbours
    if config.first_frame:
        critical |= blocks.first_frame[:, None] & blocks.first_frame[None, :]
    return critical


def largest(residual: torch.Tensor, budget: int) -> torch.Tensor:
    """bool, like residual [B, H, nb, nb]: at most `budget` blocks of a head, the largest of every row and then the
    largest of all. Of those that are equal all or none are kept.
    """
    return (score := leaders(residual)) > edge(score, budget)


def leaders(residual: torch.Tensor) -> torch.Tensor:
    """residual with +inf in place of the first largest of every row, 0 in place of NaN."""
    finite = residual.nan_to_num(0.0)
    return finite.scatter(-1, finite.argmax(-1, keepdim=True), math.inf)


def edge(score: torch.Tensor, budget: int) -> torch.Tensor:
    """[B, H, 1, 1]: the number that at most `budget` of a head's scores [B, H, nb, nb] are above, the least of them."""
    flat = score.flatten(2)
    if budget >= flat.shape[2]:
        return flat.new_full((*flat.shape[:2], 1, 1), -math.inf)
    return flat.topk(budget + 1, sorted=False).values.amin(-1)[..., None, None]
