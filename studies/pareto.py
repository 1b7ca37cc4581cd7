"""Quality against time: what `ablation.py` found of every mode, over what the operator takes at a published shape.

    python benchmarks/pareto.py --quality docs/data/ablation-held-out.csv --speed docs/data/op-speed-modes.csv

Both kinds of files may be given more than once. Prints, for every mode, error, PSNR and milliseconds at every sparsity
that was measured in both, and what a mode gains over another at equal time: its PSNR is read off between two sparsities
at the time that the other takes, pair by pair. Quality is of the demo model, time of the shape that is named: a mode
that is quicker or slower here is so everywhere, by how much is the shape's.
"""

import itertools
from bisect import bisect_left
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from matplotlib.figure import Figure

from ablation import FLOOR_SETTING, Row, by_pair, read_all, settings_of
from rectified_spaattn.benchmark.record import Row as Speed
from rectified_spaattn.benchmark.record import read_csv
from rectified_spaattn.evaluation.intervals import bootstrap
from rectified_spaattn.report.figures import MODE_COLOURS

# Timed as "ipar+gapr", of which they leave out a part: 0.04 ms of the gain or 0.1 ms of C, of 30 and more
TIMED_AS = {"none": "ipar+gapr", "pooled": "ipar+gapr", "ipar": "ipar+gapr"}
Mode = tuple[str, str]  # rectify, order


class Point(NamedTuple):
    """One mode at one sparsity: milliseconds, and PSNR and error of every pair."""

    sparsity: float
    ms: float
    psnr: dict[tuple[str, int], float]
    error: dict[tuple[str, int], float]


def points_of(rows: list[Row], speeds: list[Speed], backend: str) -> dict[Mode, list[Point]]:
    """By rising time. Only what was measured in both."""
    ms = {
        (row.sparsity, row.rectify, row.order): row.ms for row in speeds if row.kind == "sparse" and row.name == backend
    }
    found: dict[Mode, list[Point]] = {}
    for setting in settings_of(rows):
        sparsity, rectify, order = setting
        time = ms.get((sparsity, TIMED_AS.get(rectify, rectify), order))
        if setting == FLOOR_SETTING or time is None:
            continue
        of_pair = by_pair(rows, setting)
        psnr, error = ({k: getattr(row, name) for k, row in of_pair.items()} for name in ("psnr", "attention_error"))
        found.setdefault((rectify, order), []).append(Point(sparsity, time, psnr, error))
    return {mode: sorted(points, key=lambda point: point.ms) for mode, points in found.items()}


def at_time(points: list[Point], ms: float, pair: tuple[str, int]) -> float | None:
    """PSNR of a pair, read off between two sparsities; None for a time outside what was measured."""
    times = [point.ms for point in points]
    if not times[0] <= ms <= times[-1]:
        return None
    i = max(1, bisect_left(times, ms))
    before, after = points[i - 1], points[i]
    share = (ms - before.ms) / (after.ms - before.ms)
    return (1 - share) * before.psnr[pair] + share * after.psnr[pair]


def show(found: dict[Mode, list[Point]], against: list[str]) -> None:
    print("| rectify | order | sparsity | ms | attention error | PSNR, dB |\n|---|---|---|---|---|---|")
    for (rectify, order), points in found.items():
        for point in points:
            error, psnr = bootstrap([*point.error.values()]).text(3), bootstrap([*point.psnr.values()]).text(2)
            print(f"| {rectify} | {order} | {point.sparsity:.0%} | {point.ms:.1f} | {error} | {psnr} |")
    print("\n| mode | against | in the time of its | gain in PSNR at that time, dB |\n|---|---|---|---|")
    for mine, other in itertools.permutations(found, 2):
        if other[0] not in against:
            continue
        for point in found[other]:
            gains = [(at_time(found[mine], point.ms, pair), psnr) for pair, psnr in point.psnr.items()]
            known = [mine_at - theirs for mine_at, theirs in gains if mine_at is not None]
            if known:
                text = bootstrap(known).text(2, "+")
                print(f"| {', '.join(mine)} | {', '.join(other)} | {point.sparsity:.0%}, {point.ms:.1f} ms | {text} |")


def plot(found: dict[Mode, list[Point]], title: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    styles = dict(zip(dict.fromkeys(order for _, order in found), ("--", "-", ":"), strict=False))
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(
        axes, ("psnr", "error"), ("PSNR to full attention, dB", "error of a call"), strict=True
    ):
        for (rectify, order), points in found.items():
            means = [bootstrap([*getattr(point, name).values()]) for point in points]
            bars = [[each.mean - each.low for each in means], [each.high - each.mean for each in means]]
            axis.errorbar(
                [point.ms for point in points], [each.mean for each in means], yerr=bars, marker="o", markersize=4,
                color=MODE_COLOURS[rectify], linestyle=styles[order], capsize=2, elinewidth=0.7,
                label=f"{rectify}, {order}",
            )  # fmt: skip
        axis.set_xlabel("ms of a call, everything included")
        axis.set_title(label, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(
    quality: Annotated[list[Path], typer.Option(help="CSV file of `ablation.py run`.")],
    speed: Annotated[list[Path], typer.Option(help="CSV file of `rectified-spaattn bench op`.")],
    backend: Annotated[str, typer.Option(help="Whose time.")] = "fa4",
    shape: Annotated[str, typer.Option(help="At which shape.")] = "hunyuan-video",
    against: Annotated[list[str] | None, typer.Option(show_default="none ipar+gapr")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="PNG file for the figure.")] = None,
) -> None:
    rows, made_on = read_all(quality)
    files = [read_csv(path, Speed) for path in speed]
    speeds = [row for found, _ in files for row in found if row.shape == shape]
    found = points_of(rows, speeds, backend)
    if not found:
        raise typer.BadParameter(f"speed: got no {backend} at {shape} at a sparsity and mode of quality's.")
    pairs = len({(row.prompt, row.seed) for row in rows})
    splits = ", ".join(dict.fromkeys(row.split for row in rows))
    quality_of = f"quality: {pairs} prompt-seed pairs of {splits}, {made_on.device}"
    title = f"{quality_of}; time: {backend} at {shape}, {files[0][1].device}"
    print(f"{title}\n")
    show(found, against or ["none", "ipar+gapr"])
    if plot_to is not None:
        plot(found, title, plot_to)


if __name__ == "__main__":
    typer.run(main)
