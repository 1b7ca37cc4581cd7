"""`rectified-spaattn bench op`: settings in, tables and CSV files out."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..lab.bench.check import Check
from ..lab.bench.op import OpSettings, measure
from ..lab.bench.rows import Row, StageRow
from ..lab.bench.shapes import BenchError
from ..lab.machine import Origin, machine
from ..lab.rows import write_rows
from .console import markdown_table, print_wide, progress
from .options import command_line

ROWS_CSV, STAGES_CSV = "op-speed.csv", "op-stages.csv"
_TIMES = ("ms", "quartiles", "min to max")


def op(settings: OpSettings) -> None:
    """The operator against dense attention on the shapes of published models."""
    cases, console = settings.cases(), Console()
    if cases[0].device.type == "cpu" and not settings.shape:
        raise BenchError(f"{cases[0].shape.name} takes very long on a CPU. Name a shape: --shape tiny.")
    origin = machine(cases[0].device).origin(command_line())
    print_wide(console, origin_line(origin))
    rows: list[Row] = []
    stages: list[StageRow] = []
    for case in cases:
        with progress(console) as watch:
            result = measure(case, settings, watch)
        print_wide(console, checks_line(case.shape.name, result.checks))
        print_wide(console, speed_table(result.rows, origin.device))
        for row in result.rows:
            if row.not_run:
                print_wide(console, f"not run: {row.kind} {row.name}: {row.not_run}")
        for table in stage_tables(result.stages):
            print_wide(console, table)
        rows, stages = rows + result.rows, stages + result.stages
        if settings.csv_dir is not None:  # after every shape: a long run that is stopped leaves what it measured
            write_rows(settings.csv_dir / ROWS_CSV, rows, origin)
            if stages:
                write_rows(settings.csv_dir / STAGES_CSV, stages, origin)
    if settings.csv_dir is not None:
        print_wide(console, f"Rows: {settings.csv_dir / ROWS_CSV}")
        none = "none, as no backend that ran offers its stages"
        print_wide(console, f"Stages: {settings.csv_dir / STAGES_CSV if stages else none}")


def origin_line(origin: Origin) -> str:
    versions = {"torch": origin.torch, "triton": origin.triton, "flash-attn-4": origin.flash_attn_4}
    listed = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return f"{origin.device}, {listed}, commit {origin.commit or 'unknown'}"


def checks_line(name: str, checks: Sequence[Check]) -> str:
    """How close the closest of the checks came to its limit."""
    worst = max(checks, key=lambda each: each.error / each.allowed)
    return (
        f"{name}: {len(checks)} results checked before timing; the closest to its limit: {worst.name}, {worst.what}, "
        f"relative error {worst.error:.2g} of {worst.allowed:.2g} allowed"
    )


def speed_table(rows: Sequence[Row], device: str) -> Table:
    """The measured rows of one shape."""
    measured = [row for row in rows if not row.not_run]
    first = measured[0]
    lines = [
        (
            f"dense {row.name}" if row.kind == "dense" else row.name,
            "" if row.sparsity is None else f"{row.sparsity:.4g}",
            f"{row.density:.3f}",
            f"{row.ideal:.2f}x",
            *_times(row),
            f"{row.tflops:.3g}",
            "" if row.extra_bytes is None else f"{row.extra_bytes / 2**30:.2f}",
            f"{row.ratio:.2f}x",
        )
        for row in measured
    ]
    columns = (
        "attention",
        "sparsity",
        "density",
        "ideal",
        *_TIMES,
        "TFLOP/s",
        "extra GiB",
        f"speed-up over {first.dense}",
    )
    title = (
        f"{first.shape}: {first.tokens:,} tokens, {first.heads} heads of {first.head_dim}, {first.dtype}, block "
        f"{first.block_size}, {first.rectify}, {first.order}, {device}, median of {first.repeats}"
    )
    return markdown_table(columns, lines, title)


def stage_tables(stages: Sequence[StageRow]) -> list[Table]:
    """One table a backend and sparsity."""
    calls = dict.fromkeys((row.shape, row.backend, row.sparsity) for row in stages)
    return [_stage_table([r for r in stages if (r.shape, r.backend, r.sparsity) == call]) for call in calls]


def _stage_table(rows: Sequence[StageRow]) -> Table:
    first = rows[0]
    lines = [(row.stage, *_times(row), f"{row.share:.1%}") for row in rows]
    lines.append(("sum of stages", f"{sum(row.ms for row in rows):.3f}", "", "", "100%"))
    lines.append(("whole call", f"{first.whole_ms:.3f}", "", "", ""))
    title = f"{first.shape}: stages of {first.backend}, {first.rectify}, {first.order}, at {first.sparsity:.4g}"
    return markdown_table(("stage", *_TIMES, "share"), lines, title)


def _times(row: Row | StageRow) -> tuple[str, str, str]:
    return f"{row.ms:.3f}", f"{row.ms_q1:.3f} to {row.ms_q3:.3f}", f"{row.ms_min:.3f} to {row.ms_max:.3f}"
