"""Paired generation that can be stopped and continued: every pair under every mode, one file a finished clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .folder import ClipRecord, Folder, write_atomically
from .metrics import flicker, psnr, ssim
from .paired import FULL, Clip, Mode, OnStep, Pair, Settings, generate, warm_up
from .perceptual import Lpips

FLOOR = "full-other-kernel"
WriteVideo = Callable[[Path, torch.Tensor], None]  # [T, 3, H, W] in [0, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """modes: full attention first. write_video: how a clip becomes an mp4 file. lpips: None leaves it out."""

    modes: Sequence[Mode]
    settings: Settings
    backend: str
    write_video: WriteVideo
    lpips: Lpips | None


def missing(folder: Folder, job: Job, pairs: Sequence[Pair]) -> dict[Pair, list[Mode]]:
    """The modes of every pair that have no finished clip yet; pairs without any such mode are left out."""
    todo = {pair: [mode for mode in job.modes if folder.record(mode.name, pair) is None] for pair in pairs}
    return {pair: modes for pair, modes in todo.items() if modes}


def complete(
    pipe: Any, job: Job, folder: Folder, todo: dict[Pair, list[Mode]], on_step: Callable[[Mode, Pair, int], None]
) -> None:
    """Generate and measure what is missing, pair after pair, so that a busy machine disturbs all modes alike.

    todo: what `missing` gave. on_step(mode, pair, steps done) is called before a clip and after each of its steps.
    One step of every mode is run before anything is timed. Raises as `generate` does.
    """
    if not todo:
        return
    needed = {mode.name: mode for modes in todo.values() for mode in modes}
    warm_up(pipe, list(needed.values()), next(iter(todo)), job.settings, backend=job.backend)
    for pair, modes in todo.items():
        reference = folder.read_reference(pair)
        if reference is None or modes[0].name == FULL:
            clip = _generate(pipe, job, job.modes[0], pair, on_step)
            reference = clip.video
            folder.write_reference(pair, reference)
            if modes[0].name == FULL:
                _finish(job, folder, clip, reference)
        for mode in modes:
            if mode.name != FULL:
                _finish(job, folder, _generate(pipe, job, mode, pair, on_step), reference)
        folder.drop_reference(pair)


def _generate(pipe: Any, job: Job, mode: Mode, pair: Pair, on_step: OnStep) -> Clip:
    on_step(mode, pair, 0)

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(mode, pair, step + 1)
        return tensors

    return generate(pipe, mode, pair, job.settings, backend=job.backend, after_step=after_step)


def _finish(job: Job, folder: Folder, clip: Clip, reference: torch.Tensor) -> None:
    """Measure the clip and write its video, then its record: the record says that both are there."""
    path = folder.video(clip.mode.name, clip.pair)
    write_atomically(path, partial(_write, job.write_video, clip.video))
    video, full = clip.video[None], reference[None]
    folder.write_record(
        clip.pair,
        ClipRecord(
            mode=clip.mode.name,
            prompt=clip.pair.prompt,
            seed=clip.pair.seed,
            video=path.relative_to(folder.root).as_posix(),
            psnr=psnr(video, full).item(),
            ssim=ssim(video, full).item(),
            lpips=None if job.lpips is None else job.lpips(clip.video, reference),
            flicker=flicker(video).item(),
            density=clip.density,
            computed=clip.overall,
            backend=clip.backend,
            seconds=clip.seconds,
            step_seconds=clip.steps,
        ),
    )


def _write(write_video: WriteVideo, video: torch.Tensor, path: Path) -> None:
    write_video(path, video)
