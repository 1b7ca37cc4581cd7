"""Rows from the seconds that forwards of two depths took."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from ..config import preset
from .baselines import compared_with
from .models import Model
from .modes import Mode
from .record import ForwardRow, ScheduleRow
from .schedule import Line, Schedule, line, mixed_forward, most_computed
from .shapes import Case
from .timing import summary


class Key(NamedTuple):
    """A forward of `units` units; how: "eager" or "compiled"."""

    mode: Mode
    how: str
    units: int


Times = dict[Key, list[float]]  # seconds, round by round


def forward_rows(
    model: Model, size: str, case: Case, seconds: Times, whole: Times, density: Mapping[Mode, float]
) -> list[ForwardRow]:
    """One row a mode, eager and compiled.

    seconds: of two depths each; whole: of all layers, one round, for some or none; density: of the sparse modes.
    """
    low, high = sorted({key.units for key in seconds})
    kinds = list(dict.fromkeys((key.mode, key.how) for key in seconds))
    scaled = {
        kind: [
            line(few, more, low, high).at(model.units)
            for few, more in zip(seconds[Key(*kind, low)], seconds[Key(*kind, high)], strict=True)
        ]
        for kind in kinds
    }
    names = [mode.name for mode, _ in kinds if mode.kind == "dense"]
    against = compared_with(names)
    dense = median(scaled[Mode("dense", against), "eager"])

    rows = []
    for kind in kinds:
        mode, how = kind
        few, more = (median(seconds[Key(*kind, units)]) for units in (low, high))
        of_few = line(few, more, low, high)
        times = [each / 1000 for each in summary(scaled[kind])[:5]]  # from milliseconds
        rows.append(
            ForwardRow(
                model=model.name,
                size=size,
                tokens=model.shape.tokens,
                batch=model.batch,
                heads=model.shape.heads,
                head_dim=model.shape.head_dim,
                block_size=case.block_size,
                rectify=case.rectify,
                order=case.order,
                dtype=str(case.dtype).removeprefix("torch."),
                diffusers=importlib.metadata.version("diffusers"),
                kind=mode.kind,
                name=mode.name,
                sparsity=mode.sparsity,
                density=density.get(mode),
                how=how,
                layers=model.units * model.layers_a_unit,
                layers_low=low * model.layers_a_unit,
                layers_high=high * model.layers_a_unit,
                units=model.units,
                low_s=few,
                high_s=more,
                unit_s=of_few.unit,
                constant_s=of_few.constant,
                seconds=times[0],
                seconds_q1=times[1],
                seconds_q3=times[2],
                seconds_min=times[3],
                seconds_max=times[4],
                repeats=len(scaled[kind]),
                measured_s=whole.get(Key(*kind, model.units), [None])[0],
                dense=against,
                dense_s=dense,
                ratio=dense / times[0],
            )
        )
    return rows


def schedule_rows(model: Model, plan: Schedule, source: str, rows: Sequence[ForwardRow]) -> list[ScheduleRow]:
    """One row for every sparse forward. Dense steps take the baseline's time, eager or compiled as the sparse ones."""
    dense_layers = len(preset(model.preset)[0].dense_layers)
    dense = {row.how: row for row in rows if row.kind == "dense" and row.name == row.dense}
    all_dense = plan._replace(computed=plan.steps, dense=plan.steps).seconds(dense["eager"].seconds, 0.0)
    made = []
    for row in rows:
        if row.kind != "sparse" or row.sparsity is None or row.density is None:
            continue
        full = dense[row.how]
        # the medians of scaled rounds decide; a dense layer costs the difference of the units
        more = mixed_forward(_line(row), _line(full), row.units, dense_layers, model.layers_a_unit)
        step = row.seconds + more - _line(row).at(row.units)
        total = plan.seconds(full.seconds, step)
        paper = next((gain for sparsity, gain in model.paper.items() if math.isclose(sparsity, row.sparsity)), None)
        goal = model.paper_composed
        made.append(
            ScheduleRow(
                model=row.model,
                size=row.size,
                preset=model.preset,
                how=row.how,
                name=row.name,
                rectify=row.rectify,
                order=row.order,
                sparsity=row.sparsity,
                density=row.density,
                steps=plan.steps,
                computed_steps=plan.computed,
                source=source,
                dense_steps=plan.dense,
                dense_layers=dense_layers,
                calls=plan.calls,
                dense_forward_s=full.seconds,
                sparse_forward_s=step,
                total_s=total,
                dense=row.dense,
                dense_total_s=all_dense,
                speedup=all_dense / total,
                paper=paper,
                paper_composed=goal,
                steps_for_composed=None if goal is None else most_computed(plan, full.seconds, step, all_dense / goal),
            )
        )
    return made


def _line(row: ForwardRow) -> Line:
    return Line(row.constant_s, row.unit_s)
