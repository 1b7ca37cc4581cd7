"""What a call costs: its query-key pairs."""

import torch

from ..config import SparseConfig
from ..layout import TokenLayout


def density(
    block_mask: torch.Tensor, layout: TokenLayout, config: SparseConfig, text_mask: torch.Tensor | None
) -> torch.Tensor:
    """Executed query-key pairs over all pairs of the S queries and the valid keys; a float32 scalar tensor, no sync.

    Counted are the keys of kept blocks and isolated keys, one pooled key of a tail for every dropped block, all valid
    keys of isolated queries, and all valid keys of probe rows, which are computed twice: with nothing dropped it is 1,
    or with probe rows a little more. Not counted is planning, which multiplies block means.

    block_mask: bool [B, H, nb, nb]; text_mask: bool [B, text] or None.
    """
    batch, heads, nb, _ = block_mask.shape
    tiled = nb * config.block_size
    leftover, alone = layout.video - tiled, layout.sequence - tiled
    if text_mask is None:
        text = torch.full((batch,), layout.text, dtype=torch.float32, device=block_mask.device)
    else:
        text = text_mask.sum(1).float()
    keys = tiled + leftover + text  # [B] valid ones
    kept = block_mask.sum((1, 2, 3)).float() / max(1, heads * nb)  # [B] blocks a tiled query
    seen = kept * config.block_size + leftover + text
    if config.rule.tail:
        seen = seen + (nb - kept)
    tiled_share, probed = tiled / layout.sequence, min(config.probe_rows, tiled) / layout.sequence
    return (tiled_share * seen / keys).mean() + alone / layout.sequence + probed
