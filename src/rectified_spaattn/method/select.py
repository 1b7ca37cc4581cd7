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


def row_budget(top_k: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """int64 [B, H]: whole blocks that every row of a head keeps at least. top_k: float [B, H], blocks a row."""
    return top_k.nan_to_num(1.0).floor().clamp(1, num_blocks).long()


def head_budget(top_k: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """int64 [B, H]: blocks that all rows of a head keep together. top_k: float [B, H], blocks a row, on average."""
    return (top_k.double().nan_to_num(1.0) * num_blocks).floor().clamp(num_blocks, num_blocks**2).long()


def select(
    probability: torch.Tensor,
    blocks: Blocks,
    config: SparseConfig,
    residual: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [B, H, nb, nb]: the union of top-k, top-p, 3-D neighbours and (where asked for) first-frame blocks.

    probability: [B, H, nb, nb + 1] with the isolated mass last. Equal probabilities keep the lower block index first.
    residual: [B, H, nb, nb], in place of top-k by probability: see `largest`.
    top_k: float [B, H], blocks a row, in place of what the sparsity says: see `row_budget` and `head_budget`.
    Where an estimate is not finite (an infinite query or key), every block is kept, so that the rows of a block which
    full attention would compute are computed.
    """
    num_blocks = blocks.num_blocks
    to_blocks, isolated = probability[..., :num_blocks], probability[..., num_blocks:]
    ranked, block = to_blocks.sort(dim=-1, descending=True, stable=True)
    # [B, H, nb, 1]: how many blocks top-p asks for; none where the isolated tokens hold top_p already
    reached = isolated + torch.cat([torch.zeros_like(isolated), ranked.cumsum(-1)[..., :-1]], dim=-1)
    keep = (reached < config.top_p).sum(-1, keepdim=True)
    if residual is None and top_k is None:
        keep = keep.clamp(min=top_k_of(config, num_blocks))
    elif residual is None and top_k is not None:
        keep = keep.maximum(row_budget(top_k, num_blocks)[..., None, None])
    rank = torch.arange(num_blocks, device=probability.device)
    critical = torch.zeros_like(to_blocks, dtype=torch.bool).scatter_(-1, block, rank < keep)
    if residual is not None:
        constant = top_k_of(config, num_blocks) * num_blocks
        critical |= largest(residual, constant if top_k is None else head_budget(top_k, num_blocks))
    critical |= ~probability.sum(-1, keepdim=True).isfinite()
    if config.neighbours:
        critical |= blocks.neighbours
    if config.first_frame:
        critical |= blocks.first_frame[:, None] & blocks.first_frame[None, :]
    return critical


def largest(residual: torch.Tensor, budget: int | torch.Tensor) -> torch.Tensor:
    """bool, like residual [B, H, nb, nb]: at most `budget` blocks of a head, the largest of every row and then the
    largest of all. Of those that are equal all or none are kept. budget: of all heads, or int64 [B, H].
    """
    return (score := leaders(residual)) > edge(score, budget)


def leaders(residual: torch.Tensor) -> torch.Tensor:
    """residual with +inf in place of the first largest of every row, 0 in place of NaN."""
    finite = residual.nan_to_num(0.0)
    return finite.scatter(-1, finite.argmax(-1, keepdim=True), math.inf)


def edge(score: torch.Tensor, budget: int | torch.Tensor) -> torch.Tensor:
    """[B, H, 1, 1]: the number that at most `budget` of a head's scores [B, H, nb, nb] are above, the least of them.

    score: 0 or more, no NaN. budget: of all heads, or int64 [B, H]; neither waits for the device.
    """
    flat = score.flatten(2)
    if isinstance(budget, torch.Tensor):
        return _edges(flat, budget[..., None])[..., None]
    if budget >= flat.shape[2]:
        return flat.new_full((*flat.shape[:2], 1, 1), -math.inf)
    return flat.topk(budget + 1, sorted=False).values.amin(-1)[..., None, None]


def _edges(score: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """The (budget + 1)-th largest of every row of score [B, H, n], -inf where there is none: [B, H, 1].

    Floats of 0 or more are ordered as their bits are, so it is built from the highest bit down: a sort takes several
    times as long, and topk wants one number for all heads.
    """
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[score.dtype]
    bits, found = score.view(whole), torch.zeros_like(budget, dtype=whole)
    for place in reversed(range(torch.iinfo(whole).bits - 1)):
        higher = found + (1 << place)
        found = torch.where((bits >= higher).sum(-1, keepdim=True) > budget, higher, found)
    return found.view(score.dtype).masked_fill(budget >= score.shape[2], -math.inf)
