"""From clips to numbers: every clip against full attention, and one row a mode."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, quantiles
from typing import Any

import torch

from ...config import SparseConfig
from ..pages.styles import FULL, is_ours
from .clip import Clip, Mode, Pair
from .intervals import Interval, bootstrap
from .metrics import Lpips, flicker, frame_psnr, frame_ssim, psnr

SCORES = ("psnr", "ssim", "lpips", "flicker")
FRAMES = {"psnr": "psnr_frame", "ssim": "ssim_frame"}  # score -> the same of the worst frame of a clip
GAINS = ("psnr", "ssim", "lpips")  # what configurations are compared in, pair by pair
_SPEED = ("speedup", "speedup_low", "speedup_high", "ideal")
_SETTINGS = ("sparsity", "rectify", "block_size", "order", "top_p", "neighbours")


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One clip against the clip of the same prompt and seed with full attention.

    video         its file
    psnr          dB, inf for identical clips (so for full attention itself)
    ssim          1 for identical clips
    psnr_frame    of the frame that is farthest by PSNR, and which that is (worst_frame, from 0)
    ssim_frame    of the frame that is farthest by SSIM
    lpips         0 for identical clips; None where it was not asked for
    flicker       as metrics.flicker; None for a picture
    density       computed query-key pairs over all pairs, mean over the sparse calls, isolated tokens counted
    computed      the same over all calls, full ones in dense steps and layers counted as 1
    backend       what ran the sparse calls; "" for full attention
    seconds       wall clock of the whole pipeline call
    step_seconds  of every denoising step
    """

    mode: str
    prompt: str
    seed: int
    video: str
    psnr: float
    ssim: float
    psnr_frame: float
    worst_frame: int
    ssim_frame: float
    lpips: float | None
    flicker: float | None
    density: float
    computed: float
    backend: str
    seconds: float
    step_seconds: tuple[float, ...]

    @property
    def pair(self) -> Pair:
        return Pair(prompt=self.prompt, seed=self.seed)


def measure(clip: Clip, reference: torch.Tensor, video: str, lpips: Lpips | None = None) -> ClipRecord:
    """reference: the frames of full attention, [T, 3, H, W]; video: where the clip is."""
    ours, full = clip.video[None], reference[None]
    frames, likeness = frame_psnr(ours, full)[0], frame_ssim(ours, full)[0]
    return ClipRecord(
        mode=clip.mode.name,
        prompt=clip.pair.prompt,
        seed=clip.pair.seed,
        video=video,
        psnr=psnr(ours, full).item(),
        ssim=likeness.mean().item(),
        psnr_frame=frames.min().item(),
        worst_frame=int(frames.argmin()),
        ssim_frame=likeness.min().item(),
        lpips=None if lpips is None else lpips(clip.video, reference),
        flicker=flicker(ours).item() if ours.shape[1] > 1 else None,
        density=clip.density,
        computed=clip.computed,
        backend=clip.backend,
        seconds=clip.seconds,
        step_seconds=clip.steps,
    )


@dataclass(frozen=True, kw_only=True)
class ModeSummary:
    """One mode over all its clips; intervals are 95%, over the prompt-seed pairs.

    scores        psnr, ssim, lpips (where it was computed) and flicker (of videos)
    worst         psnr, ssim and lpips of the clip that is farthest, psnr_frame and ssim_frame of the farthest frame of
                  all clips; worst_video: the file of the clip with that frame by PSNR; worst_frame: which it is, from 0
    step_seconds  of one denoising step; speedup: that of full attention over it; speedup_low, speedup_high: the same
                  over the slower and the faster quartile of the steps
    """

    mode: Mode
    clips: int
    scores: Mapping[str, Interval]
    worst: Mapping[str, Any]
    density: float
    computed: float
    seconds: float
    step_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    backend: str

    @property
    def ideal(self) -> float:
        """The speed-up if a step were its query-key pairs and nothing else; more than that is a disturbance."""
        return 1 / self.computed

    def row(self) -> dict[str, Any]:
        """Plain values for a table; a score that is not there is None."""
        named = {"label": self.mode.label, "ours": is_ours(self.mode.config), "clips": self.clips}
        row: dict[str, Any] = {**mode_columns(self.mode), **named}
        for name in SCORES:
            score = self.scores.get(name)
            row[name] = None if score is None else score.mean
            for end in ("low", "high", "t_low", "t_high"):
                row[f"{name}_{end}"] = None if score is None else plain(getattr(score, end))
        row |= {name if name.startswith("worst") else f"{name}_worst": value for name, value in self.worst.items()}
        for name in ("density", "computed", "backend", "seconds", "step_seconds", *_SPEED):
            row[name] = getattr(self, name)
        return row


def summarise(
    modes: Sequence[Mode], records: Sequence[ClipRecord], step: Callable[[Sequence[float]], float] = median
) -> list[ModeSummary]:
    """One row a mode, in the order of `modes`; every mode has records.

    step: one number from the seconds of all steps of all clips; a median is not moved by a passing disturbance.
    """
    by_mode = {mode.name: [record for record in records if record.mode == mode.name] for mode in modes}
    every = {name: [each for record in own for each in record.step_seconds] for name, own in by_mode.items()}
    steps = {name: step(seconds) for name, seconds in every.items()}
    summaries = []
    for mode in modes:
        own = by_mode[mode.name]
        fast, _, slow = (
            quantiles(every[mode.name], method="inclusive") if len(every[mode.name]) > 1 else every[mode.name] * 3
        )
        columns = {name: [getattr(record, name) for record in own] for name in SCORES}
        summaries.append(
            ModeSummary(
                mode=mode,
                clips=len(own),
                scores={name: bootstrap(column) for name, column in columns.items() if None not in column},
                worst=_worst(own),
                **{name: fmean(getattr(record, name) for record in own) for name in ("density", "computed", "seconds")},
                step_seconds=steps[mode.name],
                speedup=steps[FULL] / steps[mode.name],
                speedup_low=steps[FULL] / slow,
                speedup_high=steps[FULL] / fast,
                backend=", ".join(sorted({record.backend for record in own} - {""})),
            )
        )
    return summaries


def _worst(records: Sequence[ClipRecord]) -> dict[str, Any]:
    """What ModeSummary.worst holds; lpips None where it was not computed."""
    farthest = min(records, key=lambda record: record.psnr_frame)
    distances = [record.lpips for record in records if record.lpips is not None]
    lowest = {name: min(getattr(record, name) for record in records) for name in ("psnr", "ssim", *FRAMES.values())}
    return {
        **lowest,
        "lpips": max(distances) if distances else None,
        "worst_video": farthest.video,
        "worst_frame": farthest.worst_frame,
    }


def gains(modes: Sequence[Mode], records: Sequence[ClipRecord]) -> list[dict[str, Any]]:
    """Every configuration against the first one, pair by pair: one row a configuration and score of GAINS.

    gain: mean of its score less that of the other; low, high: bootstrap; t_low, t_high: paired t; wins: pairs in which
    it is nearer to full attention.
    """
    names, rows = [mode.name for mode in modes if mode.configs], []
    for name in names[1:]:
        base = {record.pair: record for record in records if record.mode == names[0]}
        own = [record for record in records if record.mode == name]
        for score in GAINS:
            both = [(getattr(record, score), getattr(base[record.pair], score)) for record in own]
            if any(value is None or math.isinf(value) for pair in both for value in pair):
                continue
            apart = [mine - other for mine, other in both]
            gain = bootstrap(apart)
            nearer = [each < 0 if score == "lpips" else each > 0 for each in apart]
            rows.append(
                {"mode": name, "against": names[0], "score": score, "gain": gain.mean}
                | {end: getattr(gain, end) for end in ("low", "high", "t_low", "t_high")}
                | {"wins": sum(nearer), "pairs": len(nearer)}
            )
    return rows


def after_the_first(steps: Sequence[float]) -> float:
    """The mean of a single clip's steps but the first, which pays for what is done once: a median would not see dense
    or skipped steps.
    """
    return fmean(steps[1:] or steps)


def clip_rows(modes: Sequence[Mode], records: Sequence[ClipRecord]) -> list[dict[str, Any]]:
    """One row a clip with its mode's settings; seconds and step_seconds (their median) come last."""
    columns = {mode.name: mode_columns(mode) for mode in modes}
    names = (
        "psnr",
        "psnr_frame",
        "worst_frame",
        "ssim",
        "ssim_frame",
        "lpips",
        "flicker",
        "density",
        "computed",
        "backend",
        "video",
        "seconds",
    )
    return [
        {"prompt": record.prompt, "seed": record.seed, **columns[record.mode]}
        | {name: getattr(record, name) for name in names}
        | {"step_seconds": median(record.step_seconds)}
        for record in records
    ]


def mode_columns(mode: Mode) -> dict[str, Any]:
    """The settings of a mode that tables are sorted by; None for full attention."""
    values = {name: None if mode.config is None else getattr(mode.config, name) for name in _SETTINGS}
    return {"mode": mode.name, "dense_kernel": mode.kernel, **values}


def wins(records: Sequence[ClipRecord], mode: str, against: str, score: str) -> tuple[int, int]:
    """In how many pairs `mode` has the higher value of a score, and how many pairs there are."""
    other = {record.pair: getattr(record, score) for record in records if record.mode == against}
    mine = [record for record in records if record.mode == mode]
    return sum(getattr(record, score) > other[record.pair] for record in mine), len(mine)


def plain(value: Any) -> Any:
    """As JSON has it: NaN and infinity become null, tuples lists, dataclasses mappings, everything else its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(value.to_dict() if isinstance(value, SparseConfig) else asdict(value))
    return str(value).removeprefix("torch.")
