"""How many blocks the heads of one layer keep under a tolerance, from call to call of one run."""

from typing import NamedTuple

import torch

from ..attention import SparseStats
from ..config import SparseConfig
from ..method.select import top_k_of
from ..method.tolerance import highest_top_k, next_top_k


class Place(NamedTuple):
    """What calls must have in common to learn from each other: which guidance call of its step it is, and its shape."""

    turn: int
    batch: int
    heads: int
    num_blocks: int
    device: torch.device


class Budgets:
    """One tensor [B, H] for every place, on its device. Nothing here waits for the device."""

    def __init__(self) -> None:
        self._learnt: dict[Place, torch.Tensor] = {}

    def top_k(self, place: Place, config: SparseConfig) -> torch.Tensor:
        """Blocks a row for a call: float32 [B, H]; at first as many as the sparsity says."""
        learnt = self._learnt.get(place)
        if learnt is not None:
            return learnt
        guess = min(top_k_of(config, place.num_blocks), highest_top_k(config.max_density, place.num_blocks))
        return torch.full((place.batch, place.heads), float(guess), device=place.device)

    def learn(self, place: Place, top_k: torch.Tensor, stats: SparseStats, config: SparseConfig) -> torch.Tensor:
        """Take what a call with `top_k` measured. Returns bool [B, H]: was as much asked for as max_density allows?"""
        if config.tolerance is None or stats.probe is None:
            raise ValueError("learn: got a call without a tolerance or without probe rows; allowed: both.")
        highest = highest_top_k(config.max_density, place.num_blocks)
        self._learnt[place] = next_top_k(
            top_k,
            stats.block_mask.sum((2, 3)) / place.num_blocks,
            stats.probe.error,
            tolerance=config.tolerance,
            highest=highest,
            first=place not in self._learnt,
        )
        return top_k >= highest

    def __len__(self) -> int:
        return len(self._learnt)
