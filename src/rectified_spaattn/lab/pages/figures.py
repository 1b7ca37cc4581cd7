"""The figures of the demo's report. Titles are written from the numbers they are drawn from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .styles import INK, STYLES, colour, label

_DPI = 130


def error_figure(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Output errors as bars. rows: sparsity, rectify, order, and the relative output errors: mean, by_layer.

    Every mode stands at every sparsity; plain sparse is the first one, and the title compares the last one with it.
    """
    sparsities, modes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("sparsity", "rectify"))
    figure, width, worst = Figure(figsize=(9, 4), layout="constrained"), 0.8 / len(modes), max(sparsities)
    axis = figure.subplots()
    for row in rows:
        group, place, values = sparsities.index(row["sparsity"]), modes.index(row["rectify"]), row["by_layer"]
        x = group + (place - (len(modes) - 1) / 2) * width
        name = None if group else label(row["rectify"], row["order"])
        bar = axis.bar(x, row["mean"], width * 0.92, color=colour(row["rectify"]), label=name)
        [number] = axis.bar_label(bar, fmt="%.3f", padding=3, fontsize=9)  # stays readable over the dots
        number.set(bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}, zorder=4)
        axis.scatter([x] * len(values), values, s=12, color=INK, alpha=0.55, zorder=3, linewidths=0)
    axis.set_xticks(range(len(sparsities)), [f"{sparsity:.4g} sparsity" for sparsity in sparsities])
    axis.set_ylabel("relative output error\n(bar: mean, dots: layers)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(modes), loc="upper left", fontsize=9)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.18)
    means = {row["rectify"]: row["mean"] for row in rows if row["sparsity"] == worst}
    ratio = means[modes[-1]] / means["none"]
    change = f"{1 - ratio:.0%} lower" if ratio < 1 else f"{ratio - 1:.0%} higher"
    names = f"with {STYLES[modes[-1]].label} than with {STYLES['none'].label}"
    figure.suptitle(f"At {worst:.4g} sparsity the error of a call is {change} {names}", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=_DPI)
