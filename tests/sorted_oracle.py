"""The oracle where every head has an order of its own: on tokens that are moved head by head, one at a time."""

import torch

from cases import Call
from oracle import oracle


def oracle_by_head(
    call: Call, order: torch.Tensor, block_mask: torch.Tensor, compensated: torch.Tensor | None = None
) -> torch.Tensor:
    """out [B, S, H, D], float64. order: [B, H, nb * b], places of the tiled tokens; choices: bool [B, H, nb, nb]."""
    q, k, v = (x.double() for x in call.qkv)
    tiled = call.blocks.tiled
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        for h in range(q.shape[2]):
            place = torch.arange(q.shape[1])
            place[tiled] = order[i, h]
            moved = [x[i : i + 1, place, h : h + 1] for x in (q, k, v)]
            options = {name: x[i : i + 1] if name == "text_mask" else x for name, x in call.options.items()}
            choices = {"block_mask": block_mask[i : i + 1, h : h + 1]}
            if compensated is not None:
                choices["compensated"] = compensated[i : i + 1, h : h + 1]
            out[i, place, h] = oracle(*moved, call.layout, call.config, **options, **choices).out[0, :, 0]
    return out
