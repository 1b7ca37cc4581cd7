"""The oracle where every key head has an order of its own: on tokens that are moved head by head, one at a time."""

from typing import NamedTuple

import torch

from cases import Call
from oracle import Truth, oracle


class TruthByHead(NamedTuple):
    """As oracle.Truth, of all heads."""

    out: torch.Tensor
    critical: torch.Tensor
    compensated: torch.Tensor
    probability: torch.Tensor
    r: torch.Tensor
    undecided: torch.Tensor
    density: float


def oracle_by_head(
    call: Call,
    order: torch.Tensor | None,
    block_mask: torch.Tensor | None = None,
    compensated: torch.Tensor | None = None,
) -> TruthByHead:
    """order: [B, Hk, nb * b], places of the tiled tokens, or None; the choices: bool [B, H, nb, nb]."""
    (batch, sequence, heads, _), key_heads = call.qkv[0].shape, call.qkv[1].shape[2]
    group = heads // key_heads
    samples: list[list[Truth]] = [[] for _ in range(batch)]
    for i in range(batch):
        for h in range(key_heads):
            sharing = slice(h * group, (h + 1) * group)
            place = torch.arange(sequence)
            if order is not None:
                place[call.blocks.tiled] = order[i, h].long()
            one = slice(h, h + 1)
            moved = [x[i : i + 1, place, of] for x, of in zip(call.qkv, (sharing, one, one), strict=True)]
            options = {name: x[i : i + 1] if name == "text_mask" else x for name, x in call.options.items()}
            for name, x in (("block_mask", block_mask), ("compensated", compensated)):
                if x is not None:
                    options[name] = x[i : i + 1, sharing]
            truth = oracle(*moved, call.layout, call.config, **options)
            truth.out[:, place] = truth.out.clone()
            samples[i].append(truth)

    def joined(name: str, dim: int) -> torch.Tensor:
        return torch.cat([torch.cat([getattr(each, name) for each in of], dim=dim) for of in samples])

    by_head = {name: joined(name, 1) for name in ("critical", "compensated", "probability", "r", "undecided")}
    density = sum(each.density for of in samples for each in of) / (batch * key_heads)
    return TruthByHead(out=joined("out", 2), density=density, **by_head)
