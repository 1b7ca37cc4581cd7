"""Clips of several modes beside each other: the video, what is written above it, and how a page plays a clip."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..clips.clip import Pair
from ..clips.intervals import Interval
from ..clips.summary import ModeSummary
from .styles import FULL, is_ours
from .video import CELL, Row, labelled_grid, to_uint8, write_frames

HEADS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "flicker": "flicker"}


def side_by_side(
    path: Path, columns: Sequence[ModeSummary], clips: Mapping[Pair, Sequence[torch.Tensor]], fps: int, cell: int = CELL
) -> None:
    """One column a mode and one row a pair: a video, or a picture where `path` ends with .png. cell: pixels of one."""
    rows = [Row(caption=pair.caption(), clips=videos) for pair, videos in clips.items()]
    write_frames(path, labelled_grid([column_label(each) for each in columns], rows, cell), fps)


def column_label(summary: ModeSummary) -> str:
    """Two lines: the mode, and its mean PSNR."""
    if summary.mode.name == FULL:
        return f"{summary.mode.label}\nreference"
    return f"{summary.mode.label}\nPSNR {score_text(summary.scores['psnr'], 'psnr').split(' [')[0]} dB"


def ours_first(summaries: Sequence[ModeSummary]) -> list[ModeSummary]:
    """As reports list them; the rest keeps its order."""
    return sorted(summaries, key=lambda each: not is_ours(each.mode.config))


def strip(clip: torch.Tensor, height: int, width: int) -> str:
    """All frames of a clip [T, 3, H, W] in [0, 1] in a row, each height x width pixels, as a data: URI of a WebP
    picture, which a page plays in step with others."""
    small = torch.nn.functional.interpolate(clip, (height, width), mode="area")
    picture = io.BytesIO()
    Image.fromarray(np.concatenate(list(to_uint8(small)), axis=1)).save(picture, format="WEBP", quality=90, method=2)
    return f"data:image/webp;base64,{base64.b64encode(picture.getvalue()).decode()}"


def score_text(value: Interval, score: str) -> str:
    """A mean and its interval, with the digits that the score deserves; an infinite PSNR in words."""
    if math.isinf(value.mean):
        return "identical" if math.isinf(value.low) else "some identical"
    return value.text(_digits(score))


def number_text(value: float, score: str) -> str:
    """One value with the digits of its score."""
    return "identical" if math.isinf(value) else f"{value:.{_digits(score)}f}"


def _digits(score: str) -> int:
    return 2 if score.startswith("psnr") else 4
