"""Makes the clips of a choice, and keeps what it made: full attention runs once a prompt and seed."""

import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config import SparseConfig
from ..clips.clip import Clip, Mode, Pair, generate
from ..clips.evaluate import base_configs
from ..clips.metrics import psnr, ssim
from ..clips.models import Source, call_arguments, load, source_of, with_pictures
from ..pages.html import data_uri
from ..pages.styles import FULL
from ..pages.video import FPS, check_encoder, difference, enlarge, write_frames
from .choice import PLAIN, Choice, configs_of, plain_configs, same_pairs
from .options import AppOptions

_KEPT = 48  # clips
_WIDEST = 384  # pixels of one clip in the browser
_GAIN = 4  # of the difference: black from a quarter of the range on
_LEAST_SIDE = 11  # of SSIM's window

OnStep = Callable[[str, int, int], None]  # (what runs, steps done, of how many)


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """One clip beside the one of full attention. psnr, ssim: None for full attention itself, ssim for tiny frames."""

    name: str
    clip: Clip
    psnr: float | None
    ssim: float | None


@dataclass(kw_only=True, eq=False)
class Studio:
    """One model. base: configurations that a choice changes; clips: by what they were made with, the newest last."""

    pipe: Any
    source: Source
    arguments: dict[str, Any]
    backend: str
    base: tuple[SparseConfig, ...]
    fps: int
    clips: "OrderedDict[tuple[Any, ...], Clip]" = field(default_factory=OrderedDict)

    def columns(self, choice: Choice, on_step: OnStep) -> Iterator[list[Column]]:
        """Full and ours, then plain sparse between them: what there is so far, twice. Raises ClipError as `generate`.

        A choice that differs in sparsity alone finds the clip of full attention there.
        """
        full = self._clip(FULL, choice, (), on_step)
        ours = self._clip(choice.mode, choice, configs_of(choice, self.base), on_step)
        first, last = column(FULL, full, full), column(choice.mode, ours, full)
        yield [first, last]
        sparsity = same_pairs(choice, ours.computed)
        plain = self._clip(PLAIN, choice, plain_configs(sparsity, self.base), on_step)
        yield [first, column(PLAIN, plain, full), last]

    def _clip(self, name: str, choice: Choice, configs: tuple[SparseConfig, ...], on_step: OnStep) -> Clip:
        key = (choice.prompt, choice.seed, configs)
        if key not in self.clips:
            pair = Pair(prompt=choice.prompt, seed=choice.seed)
            step = lambda done, total, density: on_step(name, done, total)  # noqa: E731
            mode, call = Mode(name=name.replace(" ", "-"), label=name, configs=configs), self.arguments
            [self.clips[key]] = generate(self.pipe, mode, [pair], call, backend=self.backend, on_step=step)
            while len(self.clips) > _KEPT:
                self.clips.popitem(last=False)
        self.clips.move_to_end(key)
        return self.clips[key]


def studio(options: AppOptions, device: torch.device) -> Studio:
    """The model, loaded. Raises ClipError or ValueError where it cannot be had."""
    source = source_of(options)
    if source.makes_video:
        check_encoder()
    arguments = with_pictures(call_arguments(source, options))
    arguments.pop("prompt", None)
    pipe = load(source, options, device)
    base = base_configs(source, pipe)
    fps = options.fps or (FPS if source.is_demo else 16)
    return Studio(pipe=pipe, source=source, arguments=arguments, backend=options.backend, base=base, fps=fps)


def column(name: str, clip: Clip, full: Clip) -> Column:
    """With what is measured against full attention."""
    if clip is full:
        return Column(name=name, clip=clip, psnr=None, ssim=None)
    pair = (clip.video[None], full.video[None])
    small = min(clip.video.shape[-2:]) < _LEAST_SIDE
    return Column(name=name, clip=clip, psnr=float(psnr(*pair)), ssim=None if small else float(ssim(*pair)))


def wall(columns: Sequence[Column], width: int = _WIDEST) -> torch.Tensor:
    """Two rows of one cell a column, uint8 [T, 2 * h, columns * w, 3]: the clips, and how far each is from the first.

    What a browser shows is cut from one video, so that nothing can fall out of step. width: of a cell, at most, or the
    clip's own where that is larger than half of it.
    """
    full = columns[0].clip.video
    own = full.shape[3]
    cell = own if own > width // 2 else own * (width // own)
    rows = [
        [torch.from_numpy(enlarge(each, cell).copy()) for each in videos]
        for videos in (
            [each.clip.video for each in columns],
            [difference(each.clip.video, full, _GAIN) for each in columns],
        )
    ]
    return torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)


def video_uri(frames: torch.Tensor, fps: int) -> str:
    """An mp4, or a picture of one frame, as a data: URI. frames: uint8 [T, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("wall.png" if len(frames) == 1 else "wall.mp4")
        write_frames(path, frames.numpy(), fps)
        return data_uri(path)


def figures(column: Column) -> dict[str, str]:
    """What stands under a clip."""
    clip, score = column.clip, "reference"
    if column.psnr is not None:
        score = "identical" if math.isinf(column.psnr) else f"{column.psnr:.2f} dB"
    return {
        "name": column.name,
        "psnr": score,
        "ssim": "" if column.ssim is None else f"{column.ssim:.3f}",
        "pairs": f"{clip.computed:.1%}",
        "seconds": f"{clip.seconds:.1f} s",
    }
