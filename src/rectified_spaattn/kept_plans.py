"""Orders and block lists that calls of one run keep for the denoising steps to come: SparseConfig.replan."""

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from .attention import SparseStats, rectified_attention
from .config import SparseConfig
from .layout import TokenLayout

CAPTURED = "a CUDA graph is being captured, which would attend by this plan in every replay"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Which call of a run it is.

    layer        index; branch: which guidance call of its step
    step, total  the denoising step and the number of steps; None where nobody knows
    problem      why step, layer or branch are unknown; empty where they are known
    heads        what says which heads of the model these are; None: those that they always are
    """

    layer: int | None
    branch: Hashable
    step: int | None
    total: int | None
    problem: str = ""
    heads: torch.Tensor | None = None


class PlanKey(NamedTuple):
    """What calls must have in common to share a plan."""

    layer: int | None
    branch: Hashable
    layout: str
    batch: int
    heads: int
    key_heads: int
    device: torch.device


class KeptPlan(NamedTuple):
    """What one call decided.

    token_order  uint16, or int32 where the sequence is longer, [B, Hk, nb * b], as in SparseStats; None: of the grid
    block_bits   uint8 [B, H, nb, ceil(nb / 8)], the critical blocks, one bit each; None: chosen in every call
    heads        as in Moment
    made, until  the step that it was made in, and the last one that may take it
    """

    token_order: torch.Tensor | None
    block_bits: torch.Tensor | None
    heads: torch.Tensor | None
    made: int
    until: int

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.token_order, self.block_bits) if x is not None)


class KeptPlans:
    """The plans of one transformer in one run. Threads may share it. Nothing here waits for a device.

    planned, taken  calls that made a plan for later steps, and calls that took one
    unkept          calls that planned for themselves alone, by reason
    nbytes, peak    memory that plans hold now, and the most they held, in bytes
    """

    def __init__(self) -> None:
        self.planned = self.taken = self.nbytes = self.peak = 0
        self.unkept: Counter[str] = Counter()
        self._plans: dict[PlanKey, KeptPlan] = {}
        self._closed = False
        self._step: int | None = None  # of the last call
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        config: SparseConfig,
        moment: Moment,
        **options: Any,
    ) -> tuple[torch.Tensor, SparseStats]:
        """rectified_attention and its stats, by the plan that is kept for this call, or with one that is kept then.

        options: of rectified_attention. Where nothing can be kept the call plans for itself, and `unkept` counts it.
        """
        if not config.keeps_plans:
            return rectified_attention(q, k, v, layout, config, return_stats=True, **options)
        captured = CAPTURED if q.is_cuda and torch.cuda.is_current_stream_capturing() else ""
        problem = moment.problem or captured
        if problem or moment.step is None:
            with self._lock:
                self.unkept[problem or "the step is unknown"] += 1
            return rectified_attention(q, k, v, layout, config, return_stats=True, **options)
        if moment.step != self._step:
            self._step = moment.step
            self.expire(moment.step)
        key = PlanKey(moment.layer, moment.branch, layout.key, len(q), q.shape[2], k.shape[2], q.device)
        plan = self._take(key, moment.step, moment.heads)
        if plan is not None:
            options |= {"token_order": _order_of(plan), "block_mask": _mask_of(plan)}
        out, stats = rectified_attention(q, k, v, layout, config, return_stats=True, **options)
        if plan is None:
            self._keep(key, stats, config, moment, layout.sequence)
        return out, stats

    def expire(self, step: int | None) -> None:
        """Free what no call of this step or a later one may take. None, an unknown step: nothing."""
        if step is None:
            return
        with self._lock:
            for key in [key for key, plan in self._plans.items() if not plan.made <= step <= plan.until]:
                self._drop(key)

    def clear(self) -> None:
        """Free all plans; the figures stay."""
        with self._lock:
            self._plans.clear()
            self.nbytes = 0

    def close(self) -> None:
        """Free all plans, and keep no more of them."""
        self._closed = True
        self.clear()

    def lines(self, config: SparseConfig, of: str = "") -> Iterator[str]:
        """What a summary says, each line with its indent. of: whose plans they are."""
        if config.replan == 1:
            return
        asked = f"  replan {config.replan}{of}:"
        if not config.keeps_plans:
            yield f"{asked} nothing to keep, as order {config.order} is the grid's and kept_lists is off"
            return
        what = "orders and block lists" if config.by_content and config.kept_lists else "orders"
        what = what if config.by_content else "block lists"
        if self.planned:
            yield (
                f"{asked} {what} of {self.planned} calls were kept, {self.taken} calls took them; they held at most "
                f"{self.peak:,} bytes, now {self.nbytes:,}"
            )
        for problem, count in sorted(self.unkept.items()):
            yield f"{asked} {count} calls planned for themselves, because {problem}"

    def _take(self, key: PlanKey, step: int, heads: torch.Tensor | None) -> KeptPlan | None:
        """The plan of an earlier step; freed here where no later step may take it."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                return None
            valid = plan.made < step <= plan.until and plan.heads is heads
            if not valid or step == plan.until:
                self._drop(key)
            self.taken += valid
            return plan if valid else None

    def _keep(self, key: PlanKey, stats: SparseStats, config: SparseConfig, moment: Moment, sequence: int) -> None:
        assert moment.step is not None
        until = moment.step + config.replan - 1
        if moment.total is not None:  # the last sparse step
            until = min(until, moment.total - 1 - config.dense_last_step_count(moment.total))
        if until <= moment.step:
            return
        order = stats.token_order
        plan = KeptPlan(
            token_order=None if order is None else order.to(torch.uint16 if sequence <= 1 << 16 else torch.int32),
            block_bits=packed(stats.block_mask) if config.kept_lists else None,
            heads=moment.heads,
            made=moment.step,
            until=until,
        )
        with self._lock:
            if self._closed:
                return
            self._drop(key)
            self._plans[key] = plan
            self.planned += 1
            self.nbytes += plan.nbytes
            self.peak = max(self.peak, self.nbytes)

    def _drop(self, key: PlanKey) -> None:
        plan = self._plans.pop(key, None)
        self.nbytes -= 0 if plan is None else plan.nbytes


def packed(mask: torch.Tensor) -> torch.Tensor:
    """bool [..., n] as uint8 [..., ceil(n / 8)]: bit i % 8 of byte i // 8."""
    eights = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights * _bits(mask.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The bool [..., count] that `packed` was given."""
    return (bits[..., None] & _bits(bits.device) != 0).flatten(-2)[..., :count]


@cache  # a plan is neither kept nor taken while a CUDA graph is captured
def _bits(device: torch.device) -> torch.Tensor:
    """uint8 [8]: one bit each, the lowest first."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def _order_of(plan: KeptPlan) -> torch.Tensor | None:
    return None if plan.token_order is None else plan.token_order.to(torch.int32)


def _mask_of(plan: KeptPlan) -> torch.Tensor | None:
    return None if plan.block_bits is None else unpacked(plan.block_bits, plan.block_bits.shape[2])
