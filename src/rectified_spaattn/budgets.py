"""How many blocks the heads of a transformer keep under a tolerance, from call to call of one run."""

import threading
from typing import Any, NamedTuple

import torch

from .attention import SparseStats
from .config import SparseConfig
from .kept_plans import KeptPlans, Moment
from .layout import TokenLayout
from .method.select import top_k_of
from .method.tolerance import highest_top_k, next_top_k


class BudgetKey(NamedTuple):
    """What calls must have in common to learn from each other: layer, which guidance call of its step it is, shape."""

    layer: int | None
    turn: int
    batch: int
    heads: int
    num_blocks: int
    device: torch.device


class Budgets:
    """One tensor [B, H] for every key, on its device. Nothing here waits for a device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._learnt: dict[BudgetKey, torch.Tensor] = {}
        self._step: int | None = None
        self._shares: list[torch.Tensor] = []  # of blocks, that each call of this step gives its heads next, on average
        self._usual: torch.Tensor | None = None  # their mean, of the step before

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        config: SparseConfig,
        plans: KeptPlans,
        moment: Moment,
        *,
        turn: int,
        step: int | None,
        **options: Any,
    ) -> tuple[torch.Tensor, SparseStats, torch.Tensor | None]:
        """A call by the plans that are kept, and under a tolerance by what its heads learnt, which learn from it.

        turn: as in BudgetKey; step: in which they learn. options: of rectified_attention. Returns out, its figures and
        what `learn` gives; None without a tolerance.
        """
        if config.tolerance is None:
            return *plans.attention(q, k, v, layout, config, moment, **options), None
        key = BudgetKey(moment.layer, turn, len(q), q.shape[2], layout.video // config.block_size, q.device)
        top_k = self.top_k(key, config)
        out, stats = plans.attention(q, k, v, layout, config, moment, top_k=top_k, **options)
        with self._lock:
            return out, stats, self.learn(key, step, top_k, stats, config)

    def top_k(self, key: BudgetKey, config: SparseConfig) -> torch.Tensor:
        """Blocks a row for a call: float32 [B, H]; at first as many as the sparsity says."""
        learnt = self._learnt.get(key)
        if learnt is not None:
            return learnt
        guess = min(top_k_of(config, key.num_blocks), highest_top_k(config.max_density, key.num_blocks))
        return torch.full((key.batch, key.heads), float(guess), device=key.device)

    def learn(
        self, key: BudgetKey, step: int | None, top_k: torch.Tensor, stats: SparseStats, config: SparseConfig
    ) -> torch.Tensor:
        """Take what a call with `top_k` measured. Returns bool [B, H]: was as much asked for as max_density allows?"""
        if config.tolerance is None or stats.probe is None:
            raise ValueError("learn: got a call without a tolerance or without probe rows; allowed: both.")
        if step != self._step:
            if self._shares:
                self._usual = torch.stack([share.to(key.device, non_blocking=True) for share in self._shares]).mean()
            self._step, self._shares = step, []
        usual = top_k if self._usual is None else self._usual.to(key.device, non_blocking=True) * key.num_blocks
        highest = highest_top_k(config.max_density, key.num_blocks)
        self._learnt[key] = next_top_k(
            top_k,
            stats.block_mask.sum((2, 3)) / key.num_blocks,
            stats.probe.error,
            tolerance=config.tolerance,
            usual=usual,
            highest=highest,
            first=key not in self._learnt,
        )
        self._shares.append(self._learnt[key].mean() / key.num_blocks)
        return top_k >= highest

    def __len__(self) -> int:
        return len(self._learnt)
