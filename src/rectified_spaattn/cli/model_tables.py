"""What `bench model` prints: Markdown tables that can be pasted."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..benchmark.check import Checked
from ..benchmark.record import ForwardRow, Machine, ScheduleRow


def checks_line(name: str, checks: Sequence[Checked]) -> str:
    """How close the closest of the checks came to its limit."""
    worst = max(checks, key=lambda each: each.error / each.allowed)
    return (
        f"{name}: {len(checks)} results checked before timing; the closest to its limit: {worst.name}, {worst.what}, "
        f"relative error {worst.error:.2g} of {worst.allowed:.2g} allowed"
    )


def forward_line(first: ForwardRow, made_on: Machine) -> str:
    """What the table of forwards is about."""
    size = "" if first.size == "full" else f" ({first.size})"
    batch = "" if first.batch == 1 else f"batch {first.batch}, "
    return (
        f"{first.model}{size}: seconds of a forward, {batch}{first.tokens:,} tokens, {first.heads} heads of "
        f"{first.head_dim}, {first.dtype}, {first.rectify}, {first.order}, random weights, {made_on.device}, "
        f"median of {first.repeats}"
    )


def forward_table(rows: Sequence[ForwardRow]) -> Table:
    """Two depths that were timed, and the whole model scaled from them."""
    first = rows[0]
    timed = [_layers(first.layers_low), _layers(first.layers_high)]
    whole = [f"{first.layers} layers (scaled)", "quartiles", "min to max"]
    ratio = f"speed-up over eager {first.dense}"
    table = _table("attention", "sparsity", "density", "run", *timed, *whole, ratio)
    for row in rows:
        table.add_row(
            _name(row),
            "" if row.sparsity is None else f"{row.sparsity:.4g}",
            "" if row.density is None else f"{row.density:.4f}",
            row.how,
            f"{row.low_s:.4f}",
            f"{row.high_s:.4f}",
            f"{row.seconds:.3f}",
            f"{row.seconds_q1:.3f} to {row.seconds_q3:.3f}",
            f"{row.seconds_min:.3f} to {row.seconds_max:.3f}",
            f"{row.ratio:.2f}x",
        )
    return table


def how_scaled(row: ForwardRow) -> str:
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
    table = _table("attention", "sparsity", "run", "scaled", "measured", "off by")
    for row in rows:
        if row.measured_s is not None:
            table.add_row(
                _name(row),
                "" if row.sparsity is None else f"{row.sparsity:.4g}",
                row.how,
                f"{row.seconds:.3f}",
                f"{row.measured_s:.3f}",
                f"{row.seconds / row.measured_s - 1:+.1%}",
            )
    return table


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
    first = rows[0]
    goal = first.paper_composed
    composed = [] if goal is None else [f"at most ... computed steps for {goal:.2f}x"]
    table = _table("attention", "sparsity", "run", "seconds", "speed-up", "paper", *composed)
    for row in rows:
        steps = [] if goal is None else [f"{row.steps_for_composed or 'none'}"]
        table.add_row(
            row.name,
            f"{row.sparsity:.4g}",
            row.how,
            f"{row.total_s:.1f}",
            f"{row.speedup:.2f}x",
            "" if row.paper is None else f"{row.paper:.2f}x",
            *steps,
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, justify="left" if column in ("attention", "run") else "right", no_wrap=True)
    return table


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _name(row: ForwardRow) -> str:
    return {"dense": f"dense {row.name}", "sparse": row.name, "removed": "attention removed"}[row.kind]
