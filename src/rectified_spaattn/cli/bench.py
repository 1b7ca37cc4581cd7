"""`rectified-spaattn bench`: settings in, tables and CSV files out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..lab.bench.check import Check
from ..lab.bench.model import ModelResult
from ..lab.bench.model import measure as measure_model
from ..lab.bench.op import OpResult
from ..lab.bench.op import measure as measure_op
from ..lab.bench.processes import join, process_on_machine
from ..lab.bench.rows import StageRow
from ..lab.bench.settings import BenchSettings, ModelSettings, OpSettings
from ..lab.bench.shapes import BenchError, Watch
from ..lab.machine import Origin, device_of, machine
from ..lab.rows import write_rows
from .console import print_wide, progress, row_table, shown
from .options import command_line

_OP_FILES = {"rows": "op-speed.csv", "stages": "op-stages.csv"}
_MODEL_FILES = {"forwards": "model-forward.csv", "schedules": "model-schedule.csv"}
_TIMES = {
    "ms": "{0.ms:.3f}",
    "quartiles": "{0.ms_q1:.3f} to {0.ms_q3:.3f}",
    "min to max": "{0.ms_min:.3f} to {0.ms_max:.3f}",
}
_SPEED = {
    "attention": "{0.label}",
    "sparsity": "{0.sparsity:.4g}",
    "density": "{0.density:.3f}",
    "ideal": "{0.ideal:.2f}x",
    **_TIMES,
    "TFLOP/s": "{0.tflops:.3g}",
    "extra GiB": "{0.extra_gib:.2f}",
    "error": "{0.error:.3f}",
}
_STAGES = {"stage": "{0.stage}", **_TIMES, "share": "{0.share:.1%}"}
_FULL = {
    "attention": "{0.label}",
    "sparsity": "{0.sparsity:.4g}",
    "run": "{0.how}",
    "scaled": "{0.seconds:.3f}",
    "measured": "{0.measured_s:.3f}",
    "off by": "{0.off_by:+.1%}",
}
_RUNS = {
    "attention": "{0.name}",
    "sparsity": "{0.sparsity:.4g}",
    "run": "{0.how}",
    "seconds": "{0.total_s:.1f}",
    "speed-up": "{0.speedup:.2f}x",
    "paper": "{0.paper:.2f}x",
}
Shown = Iterator[Table | str]


def op(settings: OpSettings) -> None:
    """The whole command `bench op`."""
    cases = settings.cases()
    device = cases[0].device
    if device.type == "cpu" and not settings.shape:
        raise BenchError(f"{cases[0].shape.name} takes very long on a CPU. Name a shape: --shape tiny.")
    measures = {case.shape.name: partial(measure_op, case, settings) for case in cases}
    _run(settings, device, measures, _op_tables, _OP_FILES)


def model(settings: ModelSettings) -> None:
    """The whole command `bench model`."""
    rank, count = join(settings.device)
    device = device_of(settings.device, process_on_machine())
    if device.type == "cpu" and settings.size == "full":
        raise BenchError("size: got 'full' on a CPU, where a forward takes hours; allowed: --size tiny.")
    measures = {name: partial(measure_model, name, settings) for name in settings.model}
    if rank:
        for measure in measures.values():
            measure(lambda what, finished, total: None)
    else:
        _run(settings, device, measures, _model_tables, _MODEL_FILES, count)


def _run(
    settings: BenchSettings,
    device: torch.device,
    measures: Mapping[str, Callable[[Watch], Any]],
    tables: Callable[[Any, str, bool], Shown],
    files: Mapping[str, str],
    processes: int = 1,
) -> None:
    """Measure one after the other; print what `tables` makes of each, short on a terminal; write `files` as CSV."""
    console, origin = Console(), machine(device).origin(command_line())
    if processes > 1:
        origin = replace(origin, device=f"{processes} x {origin.device}")
    print_wide(console, _origin_line(origin))
    rows: dict[str, list[Any]] = {field: [] for field in files}
    for name, measure in measures.items():
        with progress(console) as watch:
            result = measure(watch)
        print_wide(console, _checks_line(name, result.checks))
        for each in tables(result, origin.device, not console.is_terminal):
            print_wide(console, each)
        for field, file in files.items():
            rows[field] += getattr(result, field)
            if settings.csv_dir is not None:  # after every one: a long run that is stopped leaves what it measured
                write_rows(settings.csv_dir / file, rows[field], origin)
    if settings.csv_dir is not None:
        for field, file in files.items():
            print_wide(console, f"{field.capitalize()}: {settings.csv_dir / file}")


def _origin_line(origin: Origin) -> str:
    versions = {"torch": origin.torch, "triton": origin.triton, "flash-attn-4": origin.flash_attn_4}
    listed = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return f"{origin.device}, {listed}, commit {origin.commit or 'unknown'}"


def _checks_line(name: str, checks: Sequence[Check]) -> str:
    """How close the closest of the checks came to its limit."""
    worst = max(checks, key=lambda each: each.error / each.allowed)
    return (
        f"{name}: {len(checks)} results checked before timing; the closest to its limit: {worst.name}, {worst.what}, "
        f"relative error {worst.error:.2g} of {worst.allowed:.2g} allowed"
    )


def _op_tables(result: OpResult, device: str, wide: bool) -> Shown:
    """The measured rows of one shape, what did not run, and the stages of every backend at every sparsity."""
    measured = [row for row in result.rows if not row.not_run]
    first = measured[0]
    title = (
        f"{first.shape}: {first.tokens:,} tokens, {first.heads} heads of {first.head_dim}, {first.dtype}, block "
        f"{first.block_size}, {first.rectify}, {first.order}, {device}, median of {first.repeats}"
    )
    columns = _SPEED | {f"speed-up over {first.dense}": "{0.ratio:.2f}x"}
    yield row_table(
        shown(columns, ("attention", "sparsity", "ideal", "ms", "quartiles", "speed-up"), wide), measured, title
    )
    for row in result.rows:
        if row.not_run:
            yield f"not run: {row.kind} {row.name}: {row.not_run}"
    for call in dict.fromkeys((row.backend, row.sparsity) for row in result.stages):
        yield _stage_table([row for row in result.stages if (row.backend, row.sparsity) == call], wide)


def _stage_table(rows: Sequence[StageRow], wide: bool) -> Table:
    first = rows[0]
    single = replace(first, ms_q1=None, ms_min=None)
    total = replace(single, stage="sum of stages", ms=sum(row.ms or 0.0 for row in rows), share=1.0)
    whole = replace(single, stage="whole call", ms=first.whole_ms, share=None)
    title = f"{first.shape}: stages of {first.backend}, {first.rectify}, {first.order}, at {first.sparsity:.4g}"
    return row_table(shown(_STAGES, ("stage", "ms", "quartiles", "share"), wide), [*rows, total, whole], title)


def _model_tables(result: ModelResult, device: str, wide: bool) -> Shown:
    """Forwards of two depths, and the whole model scaled from them; then the runs that they make."""
    forwards, runs = result.forwards, result.schedules
    first, run = forwards[0], runs[0]
    size = "" if first.size == "full" else f" ({first.size})"
    batch = "" if first.batch == 1 else f"batch {first.batch}, "
    yield (
        f"{first.model}{size}: seconds of a forward, {batch}{first.tokens:,} tokens, {first.heads} heads of "
        f"{first.head_dim}, {first.dtype}, {first.rectify}, {first.order}, random weights, {device}, "
        f"median of {first.repeats}"
    )
    columns = {
        "attention": "{0.label}",
        "sparsity": "{0.sparsity:.4g}",
        "density": "{0.density:.4f}",
        "run": "{0.how}",
        _layers(first.layers_low): "{0.low_s:.4f}",
        _layers(first.layers_high): "{0.high_s:.4f}",
        f"{first.layers} layers (scaled)": "{0.seconds:.3f}",
        "quartiles": "{0.seconds_q1:.3f} to {0.seconds_q3:.3f}",
        "min to max": "{0.seconds_min:.3f} to {0.seconds_max:.3f}",
        f"speed-up over eager {first.dense}": "{0.ratio:.2f}x",
        "GiB": "{0.memory_gib:.1f}",
    }
    whole = f"{first.layers} layers"
    yield row_table(shown(columns, ("attention", "sparsity", "run", whole, "speed-up"), wide), forwards)
    a_unit = first.layers // first.units
    few, more = first.layers_low // a_unit, first.layers_high // a_unit
    yield (
        f"Scaled, round by round: t({first.layers_low}) + {first.units - few} * (t({first.layers_high}) - "
        f"t({first.layers_low})) / {more - few}, where t(n) is the time of n layers; the whole model is {first.units} "
        f"times {_layers(a_unit)}. Nothing deeper than {first.layers_high} layers was built for this column."
    )
    for baseline, reason in result.not_run.items():
        yield f"not run: dense {baseline}: {reason}"
    complete = [row for row in forwards if row.measured_s is not None]
    if complete:
        yield f"{first.model}: scaled, and measured with all layers, one forward:"
        yield row_table(_FULL, complete)
    computed = f"{run.computed_steps} computed ({run.source})" if run.source else "all computed"
    yield (
        f"{run.model}: a run of {run.steps} steps, {computed}, {run.calls} forward(s) a step, "
        f"{run.dense_steps} dense steps and {run.dense_layers} dense layers ({run.preset}); "
        f"{run.dense_total_s:.4g} s with eager dense {run.dense}"
    )
    goal = run.paper_composed  # the paper's figure with TeaCache; an empty cell: never reached
    composed = {} if goal is None else {f"most computed steps for {goal:.2f}x": "{0.steps_for_composed}"}
    yield row_table(shown(_RUNS | composed, tuple(_RUNS), wide), runs)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
