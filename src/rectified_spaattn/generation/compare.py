"""A sparse generation beside the full-attention one of the same seed: numbers, and a picture of both."""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..evaluation.metrics import finite_or_none
from ..evaluation.record import scores_record
from ..evaluation.scores import MeanScore, means, score
from ..report.html import decibel
from ..report.video import Row, labelled_grid, write_frames
from .record import plain
from .run import Generated

_WIDEST = 640  # pixels of one clip in the side-by-side picture


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """rows: full attention, then the sparse run, in the terms of evaluation.scores, step_seconds apart.

    step_seconds is the mean of all steps but the first, which pays for what is done once: a median would not see dense
    or skipped steps.
    """

    rows: list[MeanScore]

    def record(self) -> list[dict[str, Any]]:
        """For JSON; a psnr of null stands for identical clips."""
        return plain(scores_record(self.rows))


def compare(full: Generated, sparse: Generated) -> Comparison:
    """PSNR, SSIM and the speed-up of a step; both generations from the same prompt and seed."""
    clips = [full.clip, sparse.clip]
    seconds = [fmean(clip.steps[1:] or clip.steps) for clip in clips]
    return Comparison(
        rows=[
            replace(row, step_seconds=each, speedup=seconds[0] / each)
            for row, each in zip(means(clips, score(clips)), seconds, strict=True)
        ]
    )


def write_side_by_side(path: Path, comparison: Comparison, full: Generated, sparse: Generated, fps: int) -> None:
    """Full attention on the left, sparse on the right. path: .mp4 for videos, .png for pictures."""
    reference, other = comparison.rows
    columns = [
        f"{reference.label}\n{reference.seconds:.1f} s",
        f"{other.label}\n{other.seconds:.1f} s, PSNR {decibel(finite_or_none(other.psnr))}, SSIM {other.ssim:.3f}",
    ]
    row = Row(caption=full.clip.pair.caption(), clips=[full.clip.video, sparse.clip.video])
    write_frames(path, labelled_grid(columns, [row], cell=min(max(full.clip.video.shape[3], 256), _WIDEST)), fps)
