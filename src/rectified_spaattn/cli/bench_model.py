"""`rectified-spaattn bench model`: settings in, tables and CSV files out."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..lab.bench.model import ModelSettings, measure
from ..lab.bench.rows import ForwardRow, ScheduleRow
from ..lab.bench.shapes import BenchError
from ..lab.machine import machine
from ..lab.rows import write_rows
from .bench import checks_line, origin_line
from .console import markdown_table, print_wide, progress
from .options import command_line

FORWARDS_CSV, SCHEDULES_CSV = "model-forward.csv", "model-schedule.csv"


def model(settings: ModelSettings) -> None:
    """Whole transformers of published models, random weights: a forward, and the denoising run it makes."""
    device, console = settings.where(), Console()
    if device.type == "cpu" and settings.size == "full":
        raise BenchError("size: got 'full' on a CPU, where a forward takes hours; allowed: --size tiny.")
    origin = machine(device).origin(command_line())
    print_wide(console, origin_line(origin))
    forwards: list[ForwardRow] = []
    runs: list[ScheduleRow] = []
    for name in settings.model:
        with progress(console) as watch:
            result = measure(name, settings, watch)
        first = result.forwards[0]
        print_wide(console, checks_line(name, result.checks))
        print_wide(console, forward_line(first, origin.device))
        print_wide(console, forward_table(result.forwards))
        print_wide(console, scaling_line(first))
        for baseline, reason in result.not_run.items():
            print_wide(console, f"not run: dense {baseline}: {reason}")
        if settings.full:
            print_wide(console, f"{name}: scaled, and measured with all layers, one forward:")
            print_wide(console, full_table(result.forwards))
        print_wide(console, schedule_line(result.schedules[0]))
        print_wide(console, schedule_table(result.schedules))
        forwards, runs = forwards + result.forwards, runs + result.schedules
        if settings.csv_dir is not None:  # after every model: a long run that is stopped leaves what it measured
            write_rows(settings.csv_dir / FORWARDS_CSV, forwards, origin)
            write_rows(settings.csv_dir / SCHEDULES_CSV, runs, origin)
    if settings.csv_dir is not None:
        print_wide(console, f"Forwards: {settings.csv_dir / FORWARDS_CSV}")
        print_wide(console, f"Runs: {settings.csv_dir / SCHEDULES_CSV}")


def forward_line(first: ForwardRow, device: str) -> str:
    """What the table of forwards is about."""
    size = "" if first.size == "full" else f" ({first.size})"
    batch = "" if first.batch == 1 else f"batch {first.batch}, "
    return (
        f"{first.model}{size}: seconds of a forward, {batch}{first.tokens:,} tokens, {first.heads} heads of "
        f"{first.head_dim}, {first.dtype}, {first.rectify}, {first.order}, random weights, {device}, "
        f"median of {first.repeats}"
    )


def forward_table(rows: Sequence[ForwardRow]) -> Table:
    """Two depths that were timed, and the whole model scaled from them."""
    first = rows[0]
    depths = (_layers(first.layers_low), _layers(first.layers_high), f"{first.layers} layers (scaled)")
    lines = [
        (
            *_variant(row),
            "" if row.density is None else f"{row.density:.4f}",
            row.how,
            f"{row.low_s:.4f}",
            f"{row.high_s:.4f}",
            f"{row.seconds:.3f}",
            f"{row.seconds_q1:.3f} to {row.seconds_q3:.3f}",
            f"{row.seconds_min:.3f} to {row.seconds_max:.3f}",
            f"{row.ratio:.2f}x",
        )
        for row in rows
    ]
    ratio = f"speed-up over eager {first.dense}"
    return markdown_table(("attention", "sparsity", "density", "run", *depths, "quartiles", "min to max", ratio), lines)


def scaling_line(row: ForwardRow) -> str:
    """The rule behind the scaled column."""
    a_unit = row.layers // row.units
    few, more = row.layers_low // a_unit, row.layers_high // a_unit
    return (
        f"Scaled, round by round: t({row.layers_low}) + {row.units - few} * (t({row.layers_high}) - "
        f"t({row.layers_low})) / {more - few}, where t(n) is the time of n layers; the whole model is "
        f"{row.units} times {_layers(a_unit)}. Nothing deeper than {row.layers_high} layers was built for this column."
    )


def full_table(rows: Sequence[ForwardRow]) -> Table:
    """The scaling rule against one forward of all layers."""
    lines = [
        (*_variant(r), r.how, f"{r.seconds:.3f}", f"{r.measured_s:.3f}", f"{r.seconds / r.measured_s - 1:+.1%}")
        for r in rows
        if r.measured_s is not None
    ]
    return markdown_table(("attention", "sparsity", "run", "scaled", "measured", "off by"), lines)


def schedule_line(first: ScheduleRow) -> str:
    """What the table of runs is about."""
    computed = "all computed" if not first.source else f"{first.computed_steps} computed ({first.source})"
    return (
        f"{first.model}: a run of {first.steps} steps, {computed}, {first.calls} forward(s) a step, "
        f"{first.dense_steps} dense steps and {first.dense_layers} dense layers ({first.preset}); "
        f"{first.dense_total_s:.4g} s with eager dense {first.dense}"
    )


def schedule_table(rows: Sequence[ScheduleRow]) -> Table:
    """Denoising runs of one model against all steps with eager dense attention.

    The last column, where the paper has a figure with TeaCache: the most computed steps with which it is reached.
    """
    goal = rows[0].paper_composed
    composed = [] if goal is None else [f"at most ... computed steps for {goal:.2f}x"]
    lines = [
        (
            row.name,
            f"{row.sparsity:.4g}",
            row.how,
            f"{row.total_s:.1f}",
            f"{row.speedup:.2f}x",
            "" if row.paper is None else f"{row.paper:.2f}x",
            *(f"{row.steps_for_composed or 'none'}" for _ in composed),
        )
        for row in rows
    ]
    return markdown_table(("attention", "sparsity", "run", "seconds", "speed-up", "paper", *composed), lines)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _variant(row: ForwardRow) -> tuple[str, str]:
    name = {"dense": f"dense {row.name}", "sparse": row.name, "removed": "attention removed"}[row.kind]
    return name, "" if row.sparsity is None else f"{row.sparsity:.4g}"
