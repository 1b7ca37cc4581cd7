"""The figures of the report. Titles are written from the numbers they are drawn from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
MODE_COLOURS = {"none": VERMILION, "pooled": ORANGE, "ipar": SKY, "ipar+gapr": BLUE, "row": GREEN}
MODE_LABELS = {
    "none": "sparse, not rectified",
    "pooled": "pooled",
    "ipar": "IPAR",
    "ipar+gapr": "rectified (IPAR + GAPR)",
    "row": "row",
}
_DPI = 130


def error_figure(path: Path, errors: Mapping[float, Mapping[str, Sequence[float]]]) -> None:
    """Output errors as bars. errors: sparsity -> rectify mode -> relative output error of every layer."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axis, modes, worst = figure.subplots(), list(next(iter(errors.values()))), max(errors)
    width = 0.8 / len(modes)
    for place, mode in enumerate(modes):
        x = np.arange(len(errors)) + (place - (len(modes) - 1) / 2) * width
        means = [float(np.mean(by_mode[mode])) for by_mode in errors.values()]
        bars = axis.bar(x, means, width * 0.92, color=MODE_COLOURS[mode], label=MODE_LABELS[mode])
        labels = axis.bar_label(bars, labels=[f"{mean:.3f}" for mean in means], padding=3, fontsize=9)
        for label in labels:  # stays readable over the dots
            label.set(bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}, zorder=4)
        for left, by_mode in zip(x, errors.values(), strict=True):
            values = by_mode[mode]
            axis.scatter([left] * len(values), values, s=12, color="#222222", alpha=0.55, zorder=3, linewidths=0)
    axis.set_xticks(np.arange(len(errors)), [f"{sparsity:.0%} sparsity" for sparsity in errors])
    axis.set_ylabel("relative output error\n(bar: mean, dots: layers)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(modes), loc="upper left", fontsize=9)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.18)
    none, rectified = (float(np.mean(errors[worst][mode])) for mode in ("none", "ipar+gapr"))
    change = f"{1 - rectified / none:.0%} lower" if rectified < none else f"{rectified / none - 1:.0%} higher"
    title = f"At {worst:.0%} sparsity the output error of an attention call is {change} with rectification"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=_DPI)
