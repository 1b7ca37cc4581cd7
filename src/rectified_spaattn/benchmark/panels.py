"""What the speed figure shows, from the rows: one panel a shape."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .record import Row


class Point(NamedTuple):
    """Speed-up over the dense baseline at a sparsity: at the median time, and at its third and first quartile."""

    sparsity: float
    speedup: float
    low: float
    high: float


class Panel(NamedTuple):
    """lines: backend -> points by sparsity; ideal: (sparsity, 1 / density); levels: baseline -> speed-up."""

    shape: str
    tokens: int
    dense: str
    lines: dict[str, list[Point]]
    ideal: list[tuple[float, float]]
    levels: dict[str, float]

    def title(self) -> str:
        """The fastest backend at the highest sparsity, in words."""
        name, best = max(((name, points[-1]) for name, points in self.lines.items()), key=lambda each: each[1])
        ideal = dict(self.ideal)[best.sparsity]
        return (
            f"{self.shape}, {self.tokens:,} tokens: at {best.sparsity:.4g} sparsity {name} is\n"
            f"{best.speedup:.1f} times as fast as dense {self.dense} (ideal: {ideal:.1f} times)"
        )


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Raises ValueError where no row is a measurement of a backend."""
    ran = [row for row in rows if row.ratio is not None]
    shapes = dict.fromkeys(row.shape for row in ran if row.kind == "sparse")
    if not shapes:
        raise ValueError("rows: got no measured backend; allowed: one or more. Run the benchmark where one can run.")
    return [_panel([row for row in ran if row.shape == shape]) for shape in shapes]


def _panel(rows: Sequence[Row]) -> Panel:
    lines: dict[str, list[Point]] = {}
    ideal: dict[float, float] = {}
    for row in sorted((row for row in rows if row.sparsity is not None), key=lambda row: row.sparsity or 0.0):
        sparsity, best, dense, ratio = _number(row.sparsity), _number(row.ideal), _number(row.dense_ms), row.ratio
        low, high = dense / _number(row.ms_q3), dense / _number(row.ms_q1)
        lines.setdefault(row.name, []).append(Point(sparsity, _number(ratio), low, high))
        ideal[sparsity] = best
    levels = {row.name: _number(row.ratio) for row in rows if row.kind == "dense"}
    return Panel(rows[0].shape, rows[0].tokens, rows[0].dense, lines, sorted(ideal.items()), levels)


def _number(value: float | None) -> float:
    if value is None:
        raise ValueError("rows: got a measurement with an empty column; allowed: complete rows. Measure again.")
    return value


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved apart as little as a pass from the lowest takes, so that neighbours differ by `gap` or more."""
    placed = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed
