"""Training clips without end: scenes drawn by worker processes, pictures drawn where the model is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rectified_spaattn.lab.demo_model.model import tokenize

from .render import render_numbers
from .table import Numbers, numbers_of
from .world import Scene, sample_scene

CHUNK = 512  # frames drawn at once


@dataclass(frozen=True)
class Batch:
    """Clips of one training step: numbers of `frames` of B scenes, and their captions as word numbers int64 [B, 32]."""

    frames: range
    numbers: Numbers
    ids: Tensor

    def pin_memory(self) -> Batch:
        return Batch(self.frames, self.numbers.pinned(), self.ids.pin_memory())


def sample_scenes(seed: int | str, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


class Batches(Dataset[Batch]):
    """Batch `index` of a run: the same for the same seed, rank and index."""

    def __init__(self, seed: int, rank: int, frames: int, num_frames: int, batch: int, dropout: float) -> None:
        self.key, self.frames, self.num_frames = f"train {seed} {rank}", frames, num_frames
        self.batch, self.dropout = batch, dropout

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"{self.key} {index}")
        every = self.num_frames // self.frames
        frames = range(rng.randrange(every), self.num_frames, every)
        scenes = [sample_scene(rng) for _ in range(self.batch)]
        captions = ["" if rng.random() < self.dropout else scene.caption() for scene in scenes]
        return Batch(frames, numbers_of(scenes, frames, self.num_frames), tokenize(captions))


def feed(batches: Batches, first: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches `first`, `first` + 1, ... without end, made ahead of time by `workers` processes."""
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, first + 10**7),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        **options,
    )
    return iter(loader)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(_frames, dynamic=False, options={"max_fusion_size": 512})


def _frames(solids: Tensor, poses: Tensor, cameras: Tensor, worlds: Tensor, size: int) -> Tensor:
    return render_numbers(Numbers(solids, poses, cameras, worlds), size, size)


def draw(numbers: Numbers, size: int, compiled: bool = False) -> Tensor:
    """Videos float32 [B, 3, T, size, size] in [-1, 1], drawn `CHUNK` frames at a time on the numbers' device.

    `compiled` draws with torch.compile where the device is a GPU.
    """
    batch, frames = numbers.cameras.shape[:2]
    compiled = compiled and numbers.cameras.is_cuda
    count = batch * frames
    length = -(-count // CHUNK) * CHUNK if compiled else count
    place = torch.arange(length, device=numbers.cameras.device).clamp_max(count - 1)  # one shape for the compiler
    clip = place // frames
    each = (
        numbers.solids[clip],
        numbers.poses.flatten(0, 1)[place].unsqueeze(1),
        numbers.cameras.flatten(0, 1)[place].unsqueeze(1),
        numbers.worlds[clip],
    )
    paint = _compiled() if compiled else _frames
    parts: Sequence[Tensor] = [
        paint(*part, size) for part in zip(*(tensor.split(CHUNK) for tensor in each), strict=True)
    ]
    return torch.cat(parts)[:count].squeeze(2).unflatten(0, (batch, frames)).transpose(1, 2).contiguous()
