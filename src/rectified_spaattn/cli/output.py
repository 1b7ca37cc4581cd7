"""The files and the table that a run leaves behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ..evaluation.metrics import finite_or_none
from ..evaluation.paired import FULL, Clip, Pair
from ..evaluation.scores import MeanScore
from ..report.html import decibel, percent
from ..report.video import Row, difference, enlarge, labelled_grid, write_mp4, write_png

ROWS = 3  # pairs in the side-by-side video
CLIP_WIDTH = 384
DIFFERENCE_GAIN = 4.0


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    video: Path
    still: Path


def write_videos(out: Path, clips: Sequence[Clip], mean: Sequence[MeanScore]) -> SideBySide:
    """One mp4 a clip under out/videos, and side-by-side.mp4 and .png. Clips of an earlier run there are removed."""
    folder = out / "videos"
    folder.mkdir(exist_ok=True)
    if (out / "metrics.json").exists():  # the folder is ours
        for old in folder.glob("*.mp4"):
            old.unlink()
    pairs = list(dict.fromkeys(clip.pair for clip in clips))
    for clip in clips:
        name = f"{pairs.index(clip.pair) + 1:02d}-seed{clip.pair.seed}-{clip.mode.name}.mp4"
        write_mp4(folder / name, enlarge(clip.video, CLIP_WIDTH))

    columns = [_column(each) for each in mean]
    by_pair = {pair: [clip.video for clip in clips if clip.pair == pair] for pair in pairs[:ROWS]}
    rows = [Row(caption=pair.caption(), clips=videos) for pair, videos in by_pair.items()]
    files = SideBySide(video=out / "side-by-side.mp4", still=out / "side-by-side.png")
    write_mp4(files.video, labelled_grid(columns, rows))
    write_png(files.still, labelled_grid(columns, _still_rows(by_pair))[0])
    return files


def mean_table(mean: Sequence[MeanScore], metrics: Mapping[str, Any]) -> Table:
    """The means as a Markdown table that can be pasted."""
    settings, device = metrics["settings"], metrics["device"]
    pairs = mean[0].clips
    table = Table(
        title=f"{pairs} prompt-seed pair{'s' * (pairs != 1)}, {settings['height']} x {settings['width']} x "
        f"{settings['num_frames']}, {settings['steps']} steps, {device['name']}",
        box=box.MARKDOWN,
    )
    for name in ("attention", "computed pairs", "PSNR, dB", "SSIM", "s per clip", "s per step", "speed-up", "backend"):
        table.add_column(name, justify="left" if name in ("attention", "backend") else "right", no_wrap=True)
    for each in mean:
        reference = each.mode == FULL
        table.add_row(
            each.label,
            percent(each.density),
            "reference" if reference else decibel(finite_or_none(each.psnr)),
            "reference" if reference else f"{each.ssim:.4f}",
            f"{each.seconds:.1f}",
            f"{each.step_seconds:.2f}",
            f"{each.speedup:.2f}x",
            each.backend or "torch SDPA",
        )
    return table


def _column(mean: MeanScore) -> str:
    if mean.mode == FULL:
        return f"{mean.label}\nreference"
    return f"{mean.label}\n{decibel(finite_or_none(mean.psnr))} dB on average"


def _still_rows(by_pair: Mapping[Pair, Sequence[torch.Tensor]]) -> list[Row]:
    """The middle frame of every clip, and below it how far it is from full attention."""
    rows = []
    for pair, videos in by_pair.items():
        middle = [video[len(video) // 2 : len(video) // 2 + 1] for video in videos]
        rows.append(Row(caption=f"{pair.caption()}, frame {len(videos[0]) // 2}", clips=middle))
        away = [difference(frame, middle[0], DIFFERENCE_GAIN) for frame in middle[1:]]
        rows.append(
            Row(caption=f"difference from full attention, × {DIFFERENCE_GAIN:g} (white: none)", clips=[None, *away])
        )
    return rows
