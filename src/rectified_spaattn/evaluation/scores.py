"""From clips to numbers: every clip against full attention, and the means of every mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from .metrics import psnr, ssim
from .paired import FULL, Clip, Pair


@dataclass(frozen=True, kw_only=True)
class Score:
    """One clip against the clip of the same prompt and seed with full attention.

    psnr     dB, inf for identical clips (so for full attention itself)
    ssim     1 for identical clips
    density, seconds, backend: as in Clip
    """

    mode: str
    prompt: str
    seed: int
    psnr: float
    ssim: float
    density: float
    seconds: float
    backend: str


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """Arithmetic means of one mode over all its clips.

    step_seconds  median over the denoising steps of all clips, which a passing disturbance does not move
    speedup       step_seconds of full attention over that of this mode
    """

    mode: str
    label: str
    clips: int
    psnr: float
    ssim: float
    density: float
    seconds: float
    step_seconds: float
    speedup: float
    backend: str


def score(clips: Sequence[Clip]) -> list[Score]:
    """Scores in the order of the clips. Raises ValueError where a pair has no clip with full attention."""
    full = {clip.pair: clip for clip in clips if clip.mode.name == FULL}
    return [_score(clip, full) for clip in clips]


def _score(clip: Clip, full: dict[Pair, Clip]) -> Score:
    if clip.pair not in full:
        raise ValueError(
            f"clips: got {clip.pair} under {clip.mode.name!r} alone; allowed: pairs that have a clip under {FULL!r}."
        )
    video, reference = clip.video[None], full[clip.pair].video[None]
    return Score(
        mode=clip.mode.name,
        prompt=clip.pair.prompt,
        seed=clip.pair.seed,
        psnr=psnr(video, reference).item(),
        ssim=ssim(video, reference).item(),
        density=clip.density,
        seconds=clip.seconds,
        backend=clip.backend,
    )


def means(clips: Sequence[Clip], scores: Sequence[Score]) -> list[MeanScore]:
    """One row a mode, in the order of their first clips."""
    modes = {clip.mode.name: clip.mode for clip in clips}
    steps = {name: median(step for clip in clips if clip.mode.name == name for step in clip.steps) for name in modes}
    return [
        _mean(mode.label, [s for s in scores if s.mode == name], steps[name], steps[FULL] / steps[name])
        for name, mode in modes.items()
    ]


def _mean(label: str, scores: Sequence[Score], step_seconds: float, speedup: float) -> MeanScore:
    return MeanScore(
        mode=scores[0].mode,
        label=label,
        clips=len(scores),
        psnr=fmean(each.psnr for each in scores),
        ssim=fmean(each.ssim for each in scores),
        density=fmean(each.density for each in scores),
        seconds=fmean(each.seconds for each in scores),
        step_seconds=step_seconds,
        speedup=speedup,
        backend=", ".join(sorted({each.backend for each in scores} - {""})),
    )


def pairs_won(scores: Sequence[Score], mode: str, against: str, metric: Literal["psnr", "ssim"]) -> tuple[int, int]:
    """In how many pairs `mode` has the higher value of `metric`, and how many pairs there are."""
    other = {(s.prompt, s.seed): getattr(s, metric) for s in scores if s.mode == against}
    mine = [s for s in scores if s.mode == mode]
    return sum(getattr(s, metric) > other[s.prompt, s.seed] for s in mine), len(mine)
