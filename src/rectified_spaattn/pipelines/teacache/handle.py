"""TeaCacheHandle: what enable_teacache gives back. It counts, reports and undoes."""

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..clock import RunClock
from ..handle import is_int
from .progress import Progress
from .transformer import CachedTransformer


@dataclass(frozen=True, kw_only=True)
class BranchStats:
    """What one transformer did in the last run, in one guidance call.

    branch         its name in cache_context; outside of any "call 1", "call 2", as they came
    steps          denoising steps it was called at
    computed       forwards whose blocks ran
    skipped        forwards whose blocks were left out
    skipped_steps  the steps of those
    """

    transformer: str
    branch: str
    steps: int
    computed: int
    skipped: int
    skipped_steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TeaCacheStats:
    """What the last run of the pipeline did. steps: denoising steps seen. computed, skipped: forwards, all branches."""

    steps: int
    computed: int
    skipped: int
    branches: tuple[BranchStats, ...]


class TeaCacheHandle(AbstractContextManager["TeaCacheHandle"]):
    """TeaCache enabled on a pipeline or a transformer. Also a context manager that disables on exit."""

    def __init__(self, cached: list[CachedTransformer], progress: Progress, pipeline: Any | None) -> None:
        self._cached = cached
        self._progress = progress
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None

    def __exit__(self, *error: object) -> None:
        self.disable()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeaCacheHandle":
        """What a deep copy of a pipeline gets that carries it: the copy is without TeaCache, so a handle of nothing."""
        return TeaCacheHandle([], Progress(RunClock(None)), None)

    @property
    def active(self) -> bool:
        return any(item.active for item in self._cached)

    def disable(self) -> None:
        """Put the model back as it was. Safe to call twice."""
        for item in self._cached:
            item.remove()

    def set_step(self, step: int | None, total: int | None = None) -> None:
        """Say which denoising step comes next, where no pipeline's scheduler tells. step: 0 .. total - 1.

        It holds for the forwards that follow, until the next set_step, until set_step(None), or until the scheduler of
        the enabled pipeline moves on: as in the handle of enable().
        """
        if step is None and total is not None:
            raise ValueError(f"total: got {total!r} without a step; allowed: set_step(None) alone.")
        if step is not None and not (is_int(step) and is_int(total) and 0 <= step < (total or 0)):
            raise ValueError(f"step: got {step!r} of total = {total!r}; allowed: integers, a step of 0 to total - 1.")
        self._progress.tell(step, total)

    def stats(self) -> TeaCacheStats:
        """Counts of the last run: of the one that is going on, or the last that was."""
        records = [(item.name, branch, record) for item in self._cached for branch, record in item.record.items()]
        branches = tuple(_branch_stats(name, branch, record) for name, branch, record in records)
        return TeaCacheStats(
            steps=len({step for _, _, record in records for step, _ in record}),
            computed=sum(each.computed for each in branches),
            skipped=sum(each.skipped for each in branches),
            branches=branches,
        )

    def summary(self) -> str:
        """A table of how many steps were computed and how many skipped, by transformer and branch."""
        lines = [f"TeaCache, {'enabled' if self.active else 'disabled'}"]
        for item in self._cached:
            fit = item.fit
            lines.append(
                f"  {item.name} ({item.kind}): fit of {fit.name}, threshold {item.threshold:g}, "
                f"first {fit.first_steps} and last {fit.last_steps} steps always computed"
            )
            if item.active and not item.is_on(self._pipeline() if self._pipeline is not None else None):
                lines.append(f"  LOST on {item.name}: the pipeline has another (replaced; disable and enable again)")
        run = self.stats()
        if not run.branches:
            return "\n".join([*lines, "  nothing has run yet"])
        forwards = run.computed + run.skipped
        lines.append(
            f"  last run: {run.steps} steps, {forwards} forwards, {run.skipped} of them skipped "
            f"({run.skipped / forwards:.0%})"
        )
        lines += [f"  {b.transformer}, {b.branch}: {b.computed} computed, {b.skipped} skipped" for b in run.branches]
        return "\n".join(lines)


def _branch_stats(transformer: str, branch: str, record: Mapping[tuple[int, float], bool]) -> BranchStats:
    skipped = tuple(step for (step, _), computed in record.items() if not computed)
    return BranchStats(
        transformer=transformer,
        branch=branch,
        steps=len({step for step, _ in record}),
        computed=len(record) - len(skipped),
        skipped=len(skipped),
        skipped_steps=skipped,
    )
