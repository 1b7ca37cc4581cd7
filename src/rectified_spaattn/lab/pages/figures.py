"""The figures of the report. Titles are written from the numbers they are drawn from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
MODE_COLOURS = {
    "none": VERMILION,
    "pooled": ORANGE,
    "ipar": SKY,
    "ipar+gapr": BLUE,
    "row": GREEN,
    "row+slope": PURPLE,
}
MODE_LABELS = {
    "none": "sparse, not rectified",
    "pooled": "pooled",
    "ipar": "IPAR",
    "ipar+gapr": "rectified (IPAR + GAPR)",
    "row": "row",
    "row+slope": "row + slope",
}
_DPI = 130


def error_figure(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Output errors as bars. rows: sparsity, rectify, and the relative output errors: mean, by_layer."""
    sparsities, modes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("sparsity", "rectify"))
    figure, width, worst = Figure(figsize=(12, 4), layout="constrained"), 0.8 / len(modes), max(sparsities)
    axis = figure.subplots()
    for row in rows:
        group, place, values = sparsities.index(row["sparsity"]), modes.index(row["rectify"]), row["by_layer"]
        x, name = (
            group + (place - (len(modes) - 1) / 2) * width,
            MODE_LABELS.get(row["rectify"], row["rectify"]) if group == 0 else None,
        )
        bar = axis.bar(x, row["mean"], width * 0.92, color=MODE_COLOURS.get(row["rectify"], GREY), label=name)
        [label] = axis.bar_label(bar, fmt="%.3f", padding=3, fontsize=9)  # stays readable over the dots
        label.set(bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}, zorder=4)
        axis.scatter([x] * len(values), values, s=12, color="#222222", alpha=0.55, zorder=3, linewidths=0)
    axis.set_xticks(range(len(sparsities)), [f"{sparsity:.0%} sparsity" for sparsity in sparsities])
    axis.set_ylabel("relative output error\n(bar: mean, dots: layers)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(modes), loc="upper left", fontsize=9)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.18)
    means = {row["rectify"]: row["mean"] for row in rows if row["sparsity"] == worst}
    ratio = means["ipar+gapr"] / means["none"]
    change = f"{1 - ratio:.0%} lower" if ratio < 1 else f"{ratio - 1:.0%} higher"
    title = f"At {worst:.0%} sparsity the output error of an attention call is {change} with rectification"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=_DPI)
