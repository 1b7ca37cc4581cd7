"""From the time of a few layers to that of a whole model, and from forwards to a denoising run; the rows of both."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from statistics import median
from typing import NamedTuple

from .architecture import Model
from .baselines import compared_with
from .rows import ForwardRow, ModelRow, Schedule, ScheduleRow, case_columns
from .shapes import Case, Variant
from .timing import time_columns


class Key(NamedTuple):
    """A forward of `units` units; how: "eager" or "compiled"."""

    variant: Variant
    how: str
    units: int


Times = dict[Key, list[float]]  # seconds, round by round


def forward_rows(
    model: Model,
    size: str,
    case: Case,
    seconds: Times,
    whole: Times,
    density: Mapping[Variant, float],
    memory: Mapping[Key, int | None],
) -> list[ForwardRow]:
    """One row a variant, eager and compiled.

    seconds: of two depths each; whole: of all layers, one round, for some or none; density: of the sparse variants;
    memory: bytes of the whole model by the key of the deeper one.
    """
    low, high = sorted({key.units for key in seconds})
    scaled = {
        (key.variant, key.how): [
            few + (more - few) / (high - low) * (model.units - low)
            for few, more in zip(times, seconds[key._replace(units=high)], strict=True)
        ]
        for key, times in seconds.items()
        if key.units == low
    }
    against = compared_with([variant.name for variant, _ in scaled if variant.kind == "dense"])
    dense = median(scaled[Variant("dense", against), "eager"])
    rows = []
    for (variant, how), times in scaled.items():
        few, more = (median(seconds[Key(variant, how, units)]) for units in (low, high))
        unit = (more - few) / (high - low)
        rows.append(
            ForwardRow(
                **case_columns(case, variant),
                **time_columns("seconds", times),
                model=model.name,
                size=size,
                batch=model.batch,
                diffusers=importlib.metadata.version("diffusers"),
                density=density.get(variant),
                how=how,
                layers=model.layers,
                layers_low=low * model.layers_a_unit,
                layers_high=high * model.layers_a_unit,
                units=model.units,
                low_s=few,
                high_s=more,
                unit_s=unit,
                constant_s=few - unit * low,
                measured_s=whole.get(Key(variant, how, model.units), [None])[0],
                dense=against,
                dense_s=dense,
                ratio=dense / median(times),
                memory_bytes=memory.get(Key(variant, how, high)),
            )
        )
    return rows


def schedule_rows(model: Model, schedule: Schedule, rows: Sequence[ForwardRow]) -> list[ScheduleRow]:
    """One row for every sparse forward. Dense steps take the baseline's time, eager or compiled as the sparse ones.

    A dense layer costs what all layers of a unit cost in the mean.
    """
    dense = {row.how: row for row in rows if row.kind == "dense" and row.name == row.dense}
    all_dense = replace(schedule, computed_steps=schedule.steps, dense_steps=schedule.steps)
    dense_total, goal = all_dense.seconds(dense["eager"].seconds, 0.0), model.paper_composed
    runs = []
    for row in rows:
        if row.sparsity is None:
            continue
        full, at = dense[row.how], row.sparsity
        step = row.seconds + schedule.dense_layers * (full.unit_s - row.unit_s) / model.layers_a_unit
        total = schedule.seconds(full.seconds, step)
        runs.append(
            ScheduleRow(
                **{each.name: getattr(row, each.name) for each in fields(ModelRow)},
                **asdict(schedule),
                dense_forward_s=full.seconds,
                sparse_forward_s=step,
                total_s=total,
                dense_total_s=dense_total,
                speedup=dense_total / total,
                paper=next((gain for sparsity, gain in model.paper.items() if math.isclose(sparsity, at)), None),
                paper_composed=goal,
                steps_for_composed=schedule.most_computed(full.seconds, step, dense_total / goal) if goal else None,
            )
        )
    return runs
