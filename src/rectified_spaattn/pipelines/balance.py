"""Which rank attends with which heads, so that none has much more to do than another.

Where `top_p` keeps more blocks of some heads than of others, all ranks wait in every layer for the one with most. Heads
that had much to do before have much to do again, so they are dealt out by what they computed in the forward before.
"""

from dataclasses import dataclass

import torch

TOLERATED = 0.05
"""How much more than the mean rank the one with most may compute before heads are dealt out."""


def dealt_out(work: torch.Tensor, ranks: int) -> torch.Tensor:
    """int64 [layers, 2, H]: which head each place has, rank after rank, as many each; and the place of each head.

    work: what every head of every layer computed, [layers, H]. Dealt out from the most to the least, there and back.
    Does not wait for the device; the same work gives the same places on every rank.
    """
    rows = work.argsort(dim=1, descending=True, stable=True).unflatten(1, (-1, ranks))  # [layers, H / ranks, ranks]
    back = torch.arange(rows.shape[1], device=work.device) % 2 == 1
    rows = rows.flip(2).where(back[:, None], rows)
    heads = rows.transpose(1, 2).flatten(1)
    return torch.stack([heads, heads.argsort(dim=1)], dim=1)


@dataclass
class RankRecord:
    """Calls of all layers in one run, by the processes that share them; sums that stay on the device.

    densities  float32 [ranks], of each rank's heads; densest: of the rank that had most to do in each call
    """

    forwards: int = 0
    calls: int = 0
    densities: torch.Tensor | None = None
    densest: torch.Tensor | float = 0.0

    def imbalance(self) -> float:
        """By how much the rank that has most in a call exceeds the mean, mean over calls. Waits for the device."""
        assert self.densities is not None
        return float(self.densest / self.densities.mean()) - 1

    def add(self, densities: torch.Tensor) -> None:
        """densities: [ranks, calls] of a forward"""
        self.forwards += 1
        self.calls += densities.shape[1]
        self.densities = densities.sum(1) if self.densities is None else self.densities + densities.sum(1)
        self.densest = self.densest + densities.amax(0).sum()
