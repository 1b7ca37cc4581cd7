"""What `bench op` prints: Markdown tables that can be pasted, never squeezed into a narrow terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..benchmark.check import Checked
from ..benchmark.record import Machine, Row, StageRow
from ..benchmark.shapes import Case

_SPEED = ("attention", "sparsity", "density", "ideal", "ms", "quartiles", "min to max", "TFLOP/s", "extra GiB")


def machine_line(made_on: Machine) -> str:
    versions = {"torch": made_on.torch, "triton": made_on.triton, "flash-attn-4": made_on.flash_attn_4}
    told = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return f"{made_on.device}, {told}, commit {made_on.commit or 'unknown'}"


def checks_line(case: Case, checks: Sequence[Checked]) -> str:
    """How close the closest of the checks came to its limit."""
    worst = max(checks, key=lambda each: each.error / each.allowed)
    return (
        f"{case.shape.name}: {len(checks)} results checked before timing; the closest to its limit: {worst.name}, "
        f"{worst.what}, error {worst.error:.2g} of {worst.allowed:.2g} allowed"
    )


def speed_table(rows: Sequence[Row], made_on: Machine) -> Table:
    """The measured rows of one shape."""
    ran = [row for row in rows if not row.not_run]
    first = ran[0]
    table = Table(
        title=f"{first.shape}: {first.tokens:,} tokens, {first.heads} heads of {first.head_dim}, {first.dtype}, block "
        f"{first.block_size}, {first.rectify}, {first.order}, {made_on.device}, median of {first.repeats}",
        box=box.MARKDOWN,
    )
    for name in (*_SPEED, f"speed-up over {first.dense}"):
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
    for row in ran:
        table.add_row(
            f"dense {row.name}" if row.kind == "dense" else row.name,
            "" if row.sparsity is None else f"{row.sparsity:.4g}",
            f"{row.density:.3f}",
            f"{row.ideal:.2f}x",
            *_times(row),
            f"{row.tflops:.3g}",
            "" if row.extra_bytes is None else f"{row.extra_bytes / 2**30:.2f}",
            f"{row.ratio:.2f}x",
        )
    return table


def stage_tables(stages: Sequence[StageRow]) -> list[Table]:
    """One table a backend and sparsity."""
    calls = dict.fromkeys((row.shape, row.backend, row.sparsity) for row in stages)
    return [_stage_table([r for r in stages if (r.shape, r.backend, r.sparsity) == call]) for call in calls]


def _stage_table(rows: Sequence[StageRow]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.shape}: stages of {first.backend}, {first.rectify}, {first.order}, at {first.sparsity:.4g}",
        box=box.MARKDOWN,
    )
    for name in ("stage", "ms", "quartiles", "min to max", "share"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.stage, *_times(row), f"{row.share:.1%}")
    table.add_row("sum of stages", f"{sum(row.ms for row in rows):.3f}", "", "", "100%")
    table.add_row("whole call", f"{first.whole_ms:.3f}", "", "", "")
    return table


def _times(row: Row | StageRow) -> tuple[str, str, str]:
    return (
        f"{row.ms:.3f}",
        f"{row.ms_q1:.3f} to {row.ms_q3:.3f}",
        f"{row.ms_min:.3f} to {row.ms_max:.3f}",
    )
