"""What a call costs: its query-key pairs."""

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from .apart import pairs_apart


def density(
    block_mask: torch.Tensor, layout: TokenLayout, config: SparseConfig, text_mask: torch.Tensor | None
) -> torch.Tensor:
    """Executed query-key pairs over all pairs of full attention, queries with the valid keys that they see; a float32
    scalar tensor, no sync.

    Counted are the keys of kept blocks and isolated keys, one pooled key of a tail for every dropped block, all valid
    keys of isolated queries, and all valid keys of probe rows, which are computed twice: with nothing dropped it is 1,
    or with probe rows a little more. Not counted are planning, which multiplies block means and sampled queries, and
    the product that gives a query a spread of its own for every pooled key.

    block_mask: bool [B, H, nb, nb]; text_mask: bool [B, text] or None.
    """
    batch, heads, nb, _ = block_mask.shape
    tiled = nb * config.block_size
    everyone = layout.sequence - layout.padding
    a_block, probes = config.block_size - config.rule.tail, min(config.probe_rows, tiled)  # keys saved; queries
    if text_mask is None and not layout.apart:  # three small operations
        pairs = everyone * everyone
        dropped = torch.rsub(block_mask.sum(dtype=torch.float32), block_mask.numel())
        a_pair = tiled * a_block / (pairs * max(1, batch * heads * nb))
        return torch.rsub(dropped, 1 + probes * everyone / pairs, alpha=a_pair)
    if text_mask is None:
        text_mask = torch.ones(batch, layout.text, dtype=torch.bool, device=block_mask.device)
    keys = layout.video + text_mask.sum(1).float()  # [B] valid ones
    kept = block_mask.sum((1, 2, 3)).float() / max(1, heads * nb)  # [B] blocks a tiled query
    saved = tiled * a_block * (nb - kept) - probes * keys  # [B] pairs
    if not layout.apart:
        return (1 - saved / (everyone * keys)).mean()
    apart = torch.cat([text_mask[:, first:last] for first, last in layout.apart_text], dim=1)  # [B, A]
    others = everyone - apart.shape[1]
    return (1 - saved / (others * keys + pairs_apart(apart, layout.causal))).mean()
