"""From the time of a few layers to that of a whole model, and from forwards to a denoising run; the rows of both."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from .baselines import compared_with
from .models import Model
from .rows import ForwardRow, ScheduleRow, case_columns
from .shapes import Case, Variant
from .timing import summary

_SECONDS = ("seconds", "seconds_q1", "seconds_q3", "seconds_min", "seconds_max")
_COMMON = ("model", "size", "name", "how", "dense", "sparsity", "density", "rectify", "order", "config")


class Schedule(NamedTuple):
    """A denoising run.

    steps: of the run; computed: those that no cache skips; dense: those with full attention, all of them computed;
    calls: forwards a step; dense_layers: with full attention in the other steps.
    """

    steps: int
    computed: int
    dense: int
    calls: int
    dense_layers: int = 0

    def check(self) -> "Schedule":
        """Itself. Raises ValueError unless dense <= computed <= steps."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}; allowed: 1 or more.")
        if not self.dense <= self.computed <= self.steps:
            raise ValueError(
                f"computed steps: got {self.computed}; allowed: {self.dense} to {self.steps}: the dense steps at the "
                "start are computed, and no more than there are."
            )
        return self

    def seconds(self, dense_forward: float, sparse_forward: float) -> float:
        return self.calls * (self.dense * dense_forward + (self.computed - self.dense) * sparse_forward)

    def most_computed(self, dense_forward: float, sparse_forward: float, allowed: float) -> int | None:
        """Most computed steps with which it takes `allowed` seconds or less; None where the dense steps take longer."""
        counts = range(max(self.dense, 1), self.steps + 1)
        fit = (n for n in counts if self._replace(computed=n).seconds(dense_forward, sparse_forward) <= allowed)
        return max(fit, default=None)


class Key(NamedTuple):
    """A forward of `units` units; how: "eager" or "compiled"."""

    variant: Variant
    how: str
    units: int


Times = dict[Key, list[float]]  # seconds, round by round


def forward_rows(
    model: Model, size: str, case: Case, seconds: Times, whole: Times, density: Mapping[Variant, float]
) -> list[ForwardRow]:
    """One row a variant, eager and compiled.

    seconds: of two depths each; whole: of all layers, one round, for some or none; density: of the sparse variants.
    """
    low, high = sorted({key.units for key in seconds})
    kinds = list(dict.fromkeys((key.variant, key.how) for key in seconds))
    scaled = {
        kind: [
            few + (more - few) / (high - low) * (model.units - low)
            for few, more in zip(seconds[Key(*kind, low)], seconds[Key(*kind, high)], strict=True)
        ]
        for kind in kinds
    }
    against = compared_with([variant.name for variant, _ in kinds if variant.kind == "dense"])
    dense = median(scaled[Variant("dense", against), "eager"])

    rows = []
    for kind in kinds:
        variant, how = kind
        few, more = (median(seconds[Key(*kind, units)]) for units in (low, high))
        unit = (more - few) / (high - low)
        times = [each / 1000 for each in summary(scaled[kind])[:5]]  # from milliseconds
        columns: dict[str, Any] = case_columns(case, variant) | dict(zip(_SECONDS, times, strict=True))
        rows.append(
            ForwardRow(
                **columns,
                model=model.name,
                size=size,
                batch=model.batch,
                diffusers=importlib.metadata.version("diffusers"),
                density=density.get(variant),
                how=how,
                layers=model.units * model.layers_a_unit,
                layers_low=low * model.layers_a_unit,
                layers_high=high * model.layers_a_unit,
                units=model.units,
                low_s=few,
                high_s=more,
                unit_s=unit,
                constant_s=few - unit * low,
                repeats=len(scaled[kind]),
                measured_s=whole.get(Key(*kind, model.units), [None])[0],
                dense=against,
                dense_s=dense,
                ratio=dense / times[0],
            )
        )
    return rows


def schedule_rows(
    model: Model, plan: Schedule, preset: str, source: str, rows: Sequence[ForwardRow]
) -> list[ScheduleRow]:
    """One row for every sparse forward. Dense steps take the baseline's time, eager or compiled as the sparse ones.

    Raises ValueError for dense layers where one unit is several layers: the time of a single layer is not known.
    """
    if plan.dense_layers and model.layers_a_unit > 1:
        raise ValueError(f"dense_layers: got {plan.dense_layers}, a unit has {model.layers_a_unit}; allowed: none.")
    dense = {row.how: row for row in rows if row.kind == "dense" and row.name == row.dense}
    all_dense = plan._replace(computed=plan.steps, dense=plan.steps).seconds(dense["eager"].seconds, 0.0)
    goal = model.paper_composed
    runs = []
    for row in rows:
        if row.kind != "sparse" or row.sparsity is None:
            continue
        full = dense[row.how]
        step = row.seconds + plan.dense_layers * (full.unit_s - row.unit_s)
        total = plan.seconds(full.seconds, step)
        runs.append(
            ScheduleRow(
                **{name: getattr(row, name) for name in _COMMON},
                preset=preset,
                steps=plan.steps,
                computed_steps=plan.computed,
                source=source,
                dense_steps=plan.dense,
                dense_layers=plan.dense_layers,
                calls=plan.calls,
                dense_forward_s=full.seconds,
                sparse_forward_s=step,
                total_s=total,
                dense_total_s=all_dense,
                speedup=all_dense / total,
                paper=next((gain for at, gain in model.paper.items() if math.isclose(at, row.sparsity)), None),
                paper_composed=goal,
                steps_for_composed=None if goal is None else plan.most_computed(full.seconds, step, all_dense / goal),
            )
        )
    return runs
