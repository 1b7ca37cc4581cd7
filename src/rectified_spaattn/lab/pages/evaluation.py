"""What people look at after an evaluation: tables, the figure, the side-by-side video and report.html."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..clips.clip import Mode
from ..clips.folder import Folder
from ..clips.modes import FLOOR
from ..clips.summary import FRAMES, ClipRecord, ModeSummary, clip_rows, gains, plain, summarise
from ..rows import write_atomically, write_json, write_rows
from .clips import HEADS, number_text, ours_first, score_text, side_by_side
from .html import data_uri, render
from .styles import FULL, INK, LINES, MARKERS, colour
from .video import read_mp4

FILES = ("clips.csv", "summary.csv", "summary.json", "scores.png", "side-by-side.mp4", "report.html")
_COLUMNS, _ROWS = 6, 3  # of the side-by-side video
_TITLES = {
    "psnr": "PSNR to full attention, dB (higher is closer)",
    "ssim": "SSIM to full attention (higher is closer)",
    "lpips": "LPIPS to full attention (lower is closer)",
    "flicker": "flicker: mean change between frames",
}


def write_evaluation(
    folder: Folder, modes: Sequence[Mode], records: Sequence[ClipRecord], manifest: Mapping[str, Any], fps: int
) -> list[ModeSummary]:
    """Writes FILES and, of several configurations, gains.csv. manifest: as in manifest.json.

    Raises OSError where a clip cannot be read back.
    """
    clips_csv, summary_csv, summary_json, figure, video, report = (folder.root / name for name in FILES)
    summaries, clips, apart = summarise(modes, records), clip_rows(modes, records), gains(modes, records)
    write_rows(clips_csv, clips)
    write_rows(summary_csv, [each.row() for each in summaries])
    write_json(summary_json, plain({"configurations": [each.row() for each in summaries], "gains": apart}))
    if apart:
        write_rows(folder.root / "gains.csv", apart)
    write_atomically(figure, lambda to: scores_figure(to, summaries))
    shown = [each for each in summaries if each.mode.name != FLOOR][:_COLUMNS]
    pairs = list(dict.fromkeys(record.pair for record in records))[:_ROWS]
    videos = {pair: [read_mp4(folder.video(each.mode.name, pair)) for each in shown] for pair in pairs}
    side_by_side(video, shown, videos, fps)
    floor = next(each for each in summaries if each.mode.name == FLOOR)
    rows = {
        "summaries": ours_first(summaries),
        "names": _names(summaries),
        "floor": floor,
        "clips": clips,
        "gains": apart,
    }
    rows |= {"verdict": verdict(summaries), "labels": {each.mode.name: each.mode.label for each in summaries}}
    words = {"titles": _TITLES, "heads": HEADS, "full": FULL, "interval": score_text, "infinity": math.inf}
    words |= {"frames": FRAMES, "number": number_text}
    media = {"figure": data_uri(figure), "video": data_uri(video)}
    render("evaluation.html", report, m=manifest, raw=json.dumps(manifest, indent=2), **rows, **words, **media)
    return summaries


def verdict(summaries: Sequence[ModeSummary]) -> str:
    """The configuration that is nearest to full attention by PSNR, and the fastest one, in a sentence."""
    sparse = [each for each in summaries if each.mode.configs]
    if not sparse:
        return "No configuration was compared with full attention."
    near, fast = max(sparse, key=lambda each: each.scores["psnr"].mean), max(sparse, key=lambda each: each.speedup)

    def told(each: ModeSummary) -> str:
        psnr = score_text(each.scores["psnr"], "psnr").split(" [")[0]
        return f"PSNR {psnr} dB, {each.speedup:.2f} times as fast a step"

    if near is fast:
        which = "" if len(sparse) == 1 else " is nearest to full attention and fastest"
        return f"{near.mode.label}{which}: {told(near)}."
    return (
        f"Nearest to full attention is {near.mode.label}: {told(near)}; the fastest is {fast.mode.label}: {told(fast)}."
    )


def scores_figure(path: Path, summaries: Sequence[ModeSummary]) -> None:
    """Every score against the computed pairs, one point a mode with its interval; lines join one kind of rectification.

    The noise floor, often far away, is in the titles; the flicker of full attention is a line across.
    """
    names = _names(summaries)
    lines = -(-len(names) // 2)
    figure = Figure(figsize=(11, 4.2 * lines), layout="constrained")
    axes: Any = figure.subplots(lines, 2, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _draw(axis, name, summaries)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.savefig(path, dpi=110)


def _names(summaries: Sequence[ModeSummary]) -> list[str]:
    return [name for name in _TITLES if name in summaries[0].scores]


def _draw(axis: Axes, name: str, summaries: Sequence[ModeSummary]) -> None:
    families: dict[str, list[ModeSummary]] = {}
    for each in summaries:
        if each.mode.config is not None:
            family = each.mode.label.replace(f", {100 * each.mode.config.sparsity:g}%", "")
            families.setdefault(family, []).append(each)
    for marker, (family, members) in zip(itertools.cycle(MARKERS), families.items(), strict=False):
        members.sort(key=lambda each: each.computed)
        x, scores = [100 * each.computed for each in members], [each.scores[name] for each in members]
        y = [each.mean for each in scores]
        bars = [[max(0.0, e.mean - e.low) for e in scores], [max(0.0, e.high - e.mean) for e in scores]]
        config, label = members[0].mode.configs[0], family.replace("$", r"\$")  # matplotlib would read formulas
        drawn: dict[str, Any] = {"color": colour(config.rectify), "linestyle": LINES[config.order], "marker": marker}
        axis.errorbar(x, y, yerr=bars, markersize=5, linewidth=1.6, capsize=3, label=label, **drawn)
    marked = FULL if name == "flicker" else FLOOR
    level = next(each.scores[name].mean for each in summaries if each.mode.name == marked)
    if name == "flicker":
        axis.axhline(level, color=INK, linewidth=1)
    title = f"{_TITLES[name]}\n{'full (line)' if name == 'flicker' else 'noise floor'} {level:.5g}"
    axis.set_xlabel("computed query-key pairs, %")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
