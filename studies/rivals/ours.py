"""This package's own modes: the operator itself, with as many blocks as the budget pays for."""

import math
from functools import partial

from rectified_spaattn import SparseConfig
from rectified_spaattn.method.residual import sampled_rows

from .contract import Answer, Head, NotPossible, Pairs, Rule

DIRECTIONS = 8  # of the sorting and of the choice by error


def ours(head: Head, budget: float, *, config: SparseConfig) -> Answer:
    """config: of which `sparsity` is replaced."""
    blocks, dim, tokens = head.call.blocks(config), head.q.shape[1], len(head.q)
    nb, size, rule = blocks.num_blocks, blocks.block_size, config.rule
    if not nb:
        raise NotPossible(f"block_size: got {size} for {tokens} tokens; allowed: at most that many.")
    alone = len(head.k_alone) + blocks.leftover
    looking = 1 + len(sampled_rows(size)) * rule.queries  # queries of a block: its mean, and those that are sampled
    fixed = {
        "pooled": nb * size * nb * (1 + rule.queries / 2) if rule.tail else 0,
        "estimates": nb * looking * (nb + alone),
        # scale * q H and H itself are D * D products a token, the choice looks along DIRECTIONS; a pair is 2 * D
        "products": tokens * (dim + 3 * DIRECTIONS / 2 if rule.slope else 0),
    }
    ragged = blocks.leftover * (nb * size + tokens)  # of tiled queries with left-over keys, and of left-over queries
    kept = math.floor(head.room(budget, ragged, *fixed.values()) / (nb * size**2))
    if not kept:
        raise NotPossible(f"budget: got {budget:g} of all pairs; allowed: enough for one block a row.")
    share = min(1.0, (kept + 0.5) / nb)  # the half keeps a rounded product from falling below
    out, stats = head.call.sparse(config.replace(sparsity=1 - share, top_p=0.0))
    exact = stats.block_mask.sum().item() * size**2 + ragged + tokens * len(head.k_alone)
    grouping = float(tokens * DIRECTIONS) if config.by_content else 0.0
    return Answer(out=out[0, head.call.video, 0].float(), pairs=Pairs(exact=exact, grouping=grouping, **fixed))


def rules(base: SparseConfig) -> dict[str, Rule]:
    """base: block_size and what else a model's preset says."""
    space = base.replace(order="gilbert")
    modes = {
        "plain": space.replace(rectify="none"),
        "paper": space.replace(rectify="ipar+gapr"),
        "row": base.replace(rectify="row", order="content"),
        "row+slope": base.replace(rectify="row+slope", order="content"),
        "query+slope": base.replace(rectify="query+slope", order="content"),
    }
    return {name: partial(ours, config=config) for name, config in modes.items()}
