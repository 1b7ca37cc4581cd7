"""What people look at after an evaluation: the figure, the side-by-side video and report.html."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.folder import ClipRecord
from ..evaluation.intervals import Interval
from ..evaluation.paired import FULL, Pair
from ..evaluation.run import FLOOR
from ..evaluation.summary import ModeSummary
from ..lab.pages.figures import MODE_COLOURS, PALETTE
from .html import data_uri, write_evaluation
from .video import Row, labelled_grid, write_frames

COLUMNS, ROWS = 6, 3  # of the side-by-side video
HEADS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "flicker": "flicker"}
_TITLES = {
    "psnr": "PSNR to full attention, dB (higher is closer)",
    "ssim": "SSIM to full attention (higher is closer)",
    "lpips": "LPIPS to full attention (lower is closer)",
    "flicker": "flicker: mean change between frames",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationMedia:
    figure: Path
    video: Path


def scores_figure(path: Path, summaries: Sequence[ModeSummary]) -> None:
    """Every score against the computed pairs, one point a mode with its interval; lines join one kind of rectification.

    The noise floor, often far away, is in the titles; the flicker of full attention is a dashed line.
    """
    names = [name for name in _TITLES if name in summaries[0].scores]
    figure = Figure(figsize=(6.2 * len(names), 4.6), layout="constrained")
    axes: Any = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        _draw(axis, name, summaries)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.savefig(path, dpi=110)


def side_by_side(
    path: Path, folder: Path, summaries: Sequence[ModeSummary], records: Sequence[ClipRecord], fps: int
) -> None:
    """The first clips of the first modes, the noise floor left out, read back from their videos."""
    shown = [each for each in summaries if each.mode.name != FLOOR][:COLUMNS]
    pairs = list(dict.fromkeys(Pair(prompt=record.prompt, seed=record.seed) for record in records))[:ROWS]
    files = {(record.mode, record.prompt, record.seed): folder / record.video for record in records}
    rows = [
        Row(
            caption=pair.caption(),
            clips=[read_mp4(files[each.mode.name, pair.prompt, pair.seed]) for each in shown],
        )
        for pair in pairs
    ]
    columns = [f"{each.mode.label}\n{_psnr_label(each)}" for each in shown]
    write_frames(path, labelled_grid(columns, rows), fps)


def read_mp4(path: Path) -> torch.Tensor:
    """[T, 3, H, W] in [0, 1]"""
    import imageio.v3 as iio

    return torch.from_numpy(iio.imread(path, plugin="FFMPEG")).permute(0, 3, 1, 2).float() / 255


def write_evaluation_report(
    path: Path,
    manifest: Mapping[str, Any],
    summaries: Sequence[ModeSummary],
    clips: Sequence[Mapping[str, Any]],
    media: EvaluationMedia,
) -> None:
    """Render the report. manifest: as in manifest.json; clips: rows of clips.csv. Nothing is linked to but videos."""
    names = [name for name in _TITLES if name in summaries[0].scores]
    values = {
        "m": manifest,
        "summaries": summaries,
        "names": names,
        "titles": _TITLES,
        "heads": HEADS,
        "floor": next(each for each in summaries if each.mode.name == FLOOR),
        "clips": clips,
        "full": FULL,
        "interval": interval,
        "infinity": math.inf,
        "figure": data_uri(media.figure),
        "video": data_uri(media.video),
        "raw": json.dumps(manifest, indent=2),
    }
    write_evaluation(path, values)


def interval(value: Interval, score: str) -> str:
    """A mean and its interval, with the digits that the score deserves; an infinite PSNR in words."""
    if math.isinf(value.mean):
        return "identical" if math.isinf(value.low) else "some identical"
    return value.text(2 if score == "psnr" else 4)


def _draw(axis: Axes, name: str, summaries: Sequence[ModeSummary]) -> None:
    families: dict[str, list[ModeSummary]] = {}
    for each in summaries:
        if each.mode.config is not None:
            family = each.mode.label.replace(f", {100 * each.mode.config.sparsity:g}%", "")
            families.setdefault(family, []).append(each)
    spare = itertools.cycle(colour for colour in PALETTE if colour not in MODE_COLOURS.values())
    for family, members in families.items():
        members.sort(key=lambda each: each.computed)
        x, found = [100 * each.computed for each in members], [each.scores[name] for each in members]
        y = [each.mean for each in found]
        bars = [[max(0.0, e.mean - e.low) for e in found], [max(0.0, e.high - e.mean) for e in found]]
        colour = MODE_COLOURS.get(family) or next(spare)
        axis.errorbar(x, y, yerr=bars, color=colour, marker="o", markersize=5, linewidth=1.6, capsize=3, label=family)
    marked = FULL if name == "flicker" else FLOOR
    level = next(each.scores[name].mean for each in summaries if each.mode.name == marked)
    if name == "flicker":
        axis.axhline(level, color="#222222", linestyle="--", linewidth=1)
    title = f"{_TITLES[name]}\n{'full attention (dashed)' if name == 'flicker' else 'noise floor'} {level:.5g}"
    axis.set_xlabel("computed query-key pairs, %")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _psnr_label(summary: ModeSummary) -> str:
    if summary.mode.name == FULL:
        return "reference"
    return f"{summary.scores['psnr'].mean:.2f} dB on average"
