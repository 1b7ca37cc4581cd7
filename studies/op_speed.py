"""The figure of docs/benchmarks.md: speed-up over dense attention against sparsity, one panel a shape.

python -m studies.op_speed docs/data/op-speed.csv docs/images/op-speed.png
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rectified_spaattn.lab.bench.rows import Row
from rectified_spaattn.lab.pages.styles import GREY, INK, LINES, MARKERS, colour, label

from .rows import read_rows


class Point(NamedTuple):
    """Speed-up over the dense baseline at a sparsity: at the median time, and at its third and first quartile."""

    sparsity: float
    speedup: float
    low: float
    high: float


class Panel(NamedTuple):
    """rectify, order: of all lines; lines: backend -> points by sparsity; ideal: (sparsity, 1 / density); levels:
    baseline -> speed-up."""

    shape: str
    tokens: int
    dense: str
    rectify: str
    order: str
    lines: dict[str, list[Point]]
    ideal: list[tuple[float, float]]
    levels: dict[str, float]

    def title(self) -> str:
        """The fastest backend at the highest sparsity, in words."""
        name, best = max(((name, points[-1]) for name, points in self.lines.items()), key=lambda each: each[1])
        ideal = dict(self.ideal)[best.sparsity]
        return (
            f"{self.shape}, {self.tokens:,} tokens, {label(self.rectify, self.order)}: "
            f"at {best.sparsity:.4g} sparsity {name} is\n"
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
    first = rows[0]
    return Panel(
        first.shape, first.tokens, first.dense, first.rectify, first.order, lines, sorted(ideal.items()), levels
    )


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


def speed_figure(path: Path, panels: Sequence[Panel], machine: str) -> None:
    """Speed-up over dense attention against sparsity, one panel a shape; a logarithmic speed axis.

    machine: what the figure's last line says about where it was measured.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 4.8 * rows + 0.3), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_speed(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel(f"{machine}. Points: medians; bars: quartiles of the sparse call's time.", fontsize=8, color=GREY)
    figure.savefig(path, dpi=130)


def _draw_speed(axis: Axes, panel: Panel) -> None:
    drawn = {"color": colour(panel.rectify), "linestyle": LINES[panel.order]}
    sparsities, ideal = zip(*panel.ideal, strict=True)
    first, last = min(sparsities), max(sparsities)
    width = max(last - first, 0.02)
    axis.set_yscale("log")
    axis.plot(sparsities, ideal, color=GREY, linewidth=1.0)
    ends = [(f"ideal {ideal[-1]:.1f}x", ideal[-1], GREY)]
    for (name, points), marker in zip(panel.lines.items(), MARKERS * len(panel.lines), strict=False):
        x, y = [point.sparsity for point in points], [point.speedup for point in points]
        bars = [[point.speedup - point.low for point in points], [point.high - point.speedup for point in points]]
        axis.errorbar(x, y, yerr=bars, marker=marker, markersize=5, linewidth=1.8, capsize=3, **drawn)
        ends.append((f"{name} {y[-1]:.1f}x", y[-1], drawn["color"]))
    for level in panel.levels.values():
        axis.axhline(level, color=INK, linewidth=0.9)
    shown = [*ideal, *panel.levels.values(), *(y for points in panel.lines.values() for p in points for y in p[2:])]
    low, high = min(shown) / 1.15, max(shown) * 1.15
    axis.set(ylim=(low, high), xlim=(first - 0.3 * width, last + 0.28 * width))
    gap = float(np.log(high / low)) * 0.05  # the height of a line of text
    for (text, _, shade), place in zip(ends, _spread_log([y for _, y, _ in ends], gap), strict=True):
        axis.text(last + 0.03 * width, place, text, color=shade, va="center", fontsize=9, fontweight="bold")
    names = [f"dense {name}" for name in panel.levels]
    for text, place in zip(names, _spread_log(list(panel.levels.values()), gap), strict=True):
        axis.text(first - 0.28 * width, place, text, color=INK, va="bottom", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(sparsities, [f"{sparsity:.4g}" for sparsity in sparsities], fontsize=8)
    axis.set_xlabel("sparsity (share of blocks dropped)")
    axis.set_ylabel(f"speed-up over dense {panel.dense}")
    axis.set_title(panel.title(), fontsize=10, fontweight="bold", loc="left")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _spread_log(values: Sequence[float], gap: float) -> list[float]:
    return [float(np.exp(value)) for value in spread([float(np.log(value)) for value in values], gap)]


def main(csv: Path, out: Path) -> None:
    """csv: that `rectified-spaattn bench op --csv-dir` wrote; out: PNG to write."""
    rows, origin = read_rows(csv, Row)
    out.parent.mkdir(parents=True, exist_ok=True)
    speed_figure(out, panels(rows), f"{origin.device}, {rows[0].dtype}, torch {origin.torch}")


if __name__ == "__main__":
    typer.run(main)
