"""Quality against time: what `ablation.py` measured of every mode, over what the operator takes at a published shape.

    python -m studies.pareto --quality studies/data/ablation-held-out.csv --speed docs/data/op-speed-modes.csv

Both kinds of files may be given more than once. Prints, for every mode, error, PSNR and milliseconds at every sparsity
that was measured in both, and what a mode gains over another at equal time: its PSNR is read off between two sparsities
at the time that the other takes, pair by pair. Quality is of the demo model, time of the shape that is named: a mode
that is quicker or slower here is so everywhere, by how much is the shape's.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from rectified_spaattn.lab.bench.rows import Row as Speed
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.clips.intervals import bootstrap
from rectified_spaattn.lab.option import option
from rectified_spaattn.lab.pages.styles import LINES, colour
from rectified_spaattn.lab.pages.styles import label as label_of

from . import harness
from .ablation import FLOOR_SETTING, Row
from .rows import read_rows

# Timed as "ipar+gapr", of which they leave out a part: 0.04 ms of the gain or 0.1 ms of C, of 30 and more
TIMED_AS = {"none": "ipar+gapr", "pooled": "ipar+gapr", "ipar": "ipar+gapr"}
Mode = tuple[str, str]  # rectify, order


class Point(NamedTuple):
    """One mode at one sparsity: milliseconds, and PSNR and error of every pair."""

    sparsity: float
    ms: float
    psnr: dict[Pair, float]
    error: dict[Pair, float]


def points_of(rows: Sequence[Row], speeds: Sequence[Speed], backend: str) -> dict[Mode, list[Point]]:
    """By rising time. Only what was measured in both."""
    ms = {
        (row.sparsity, row.rectify, row.order): row.ms
        for row in speeds
        if (row.kind, row.name, row.precision) == ("sparse", backend, "inputs")
    }
    points: dict[Mode, list[Point]] = {}
    for setting, of_pair in harness.settings_of(rows).items():
        sparsity, rectify, order = setting
        time = ms.get((sparsity, TIMED_AS.get(rectify, rectify), order))
        if setting == FLOOR_SETTING or time is None:
            continue
        psnr, error = ({k: getattr(row, name) for k, row in of_pair.items()} for name in ("psnr", "attention_error"))
        points.setdefault((rectify, order), []).append(Point(sparsity, time, psnr, error))
    return {mode: sorted(some, key=lambda point: point.ms) for mode, some in points.items()}


def at_time(points: list[Point], ms: float, pair: Pair) -> float | None:
    """PSNR of a pair, read off between two sparsities; None for a time outside what was measured."""
    times = [point.ms for point in points]
    if not times[0] <= ms <= times[-1]:
        return None
    i = max(1, bisect_left(times, ms))
    before, after = points[i - 1], points[i]
    share = (ms - before.ms) / (after.ms - before.ms)
    return (1 - share) * before.psnr[pair] + share * after.psnr[pair]


def show(by_mode: dict[Mode, list[Point]], against: Sequence[str]) -> None:
    print("| rectify | order | sparsity | ms | attention error | PSNR, dB |\n|---|---|---|---|---|---|")
    for (rectify, order), points in by_mode.items():
        for point in points:
            error, psnr = bootstrap([*point.error.values()]).text(3), bootstrap([*point.psnr.values()]).text(2)
            print(f"| {rectify} | {order} | {point.sparsity:.0%} | {point.ms:.1f} | {error} | {psnr} |")
    print("\n| mode | against | in the time of its | gain in PSNR at that time, dB |\n|---|---|---|---|")
    for mine, other in itertools.permutations(by_mode, 2):
        if other[0] not in against:
            continue
        for point in by_mode[other]:
            gains = [(at_time(by_mode[mine], point.ms, pair), psnr) for pair, psnr in point.psnr.items()]
            known = [mine_at - theirs for mine_at, theirs in gains if mine_at is not None]
            if known:
                text = bootstrap(known).text(2, "+")
                print(f"| {', '.join(mine)} | {', '.join(other)} | {point.sparsity:.0%}, {point.ms:.1f} ms | {text} |")


def plot(by_mode: dict[Mode, list[Point]], title: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(
        axes, ("psnr", "error"), ("PSNR to full attention, dB", "error of a call"), strict=True
    ):
        for (rectify, order), points in by_mode.items():
            means = [bootstrap([*getattr(point, name).values()]) for point in points]
            bars = [[each.mean - each.low for each in means], [each.high - each.mean for each in means]]
            axis.errorbar(
                [point.ms for point in points], [each.mean for each in means], yerr=bars, marker="o", markersize=4,
                color=colour(rectify), linestyle=LINES[order], capsize=2, elinewidth=0.7,
                label=label_of(rectify, order),
            )  # fmt: skip
        axis.set_xlabel("ms of a call, everything included")
        axis.set_title(label, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True, kw_only=True)
class Options:
    quality: tuple[Path, ...] = option("CSV file of studies.ablation.")
    speed: tuple[Path, ...] = option("CSV file of `rectified-spaattn bench op`.")
    backend: str = option("Whose time.", "fa4")
    shape: str = option("At which shape.", "hunyuan-video")
    against: tuple[str, ...] = option("Modes to compare the others with.", ("none", "ipar+gapr"))
    plot: Path | None = option("PNG file for the figure.", None)


def pareto(options: Options) -> None:
    """Quality against time."""
    rows, origin = harness.read(options.quality, Row)
    files = [read_rows(path, Speed) for path in options.speed]
    speeds = [row for some, _ in files for row in some if row.shape == options.shape]
    by_mode = points_of(rows, speeds, options.backend)
    if not by_mode:
        raise SystemExit(
            f"--speed: got no {options.backend} at {options.shape} at a sparsity and mode of --quality's; allowed: a "
            "file that has them."
        )
    pairs = len({row.pair for row in rows})
    splits = ", ".join(dict.fromkeys(row.split for row in rows))
    quality_of = f"quality: {pairs} prompt-seed pairs of {splits}, {origin.device}"
    title = f"{quality_of}; time: {options.backend} at {options.shape}, {files[0][1].device}"
    print(f"{title}\n")
    show(by_mode, options.against)
    if options.plot is not None:
        plot(by_mode, title, options.plot)


if __name__ == "__main__":
    harness.application(Options, pareto)()
