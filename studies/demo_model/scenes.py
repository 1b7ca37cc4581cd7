"""Captioned videos made on the fly: textured shapes that move over a textured background.

A scene is a few words (what the caption says) and a few random numbers (what it leaves open: where exactly, how fast,
which phase of the stripes). `render` turns a list of scenes into one tensor, on any device, with no Python loop over
pixels or samples. Positions and motions are on the screen: a camera pan moves the background only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.15, 0.15),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.95, 0.86, 0.15),
    "green": (0.15, 0.65, 0.25),
    "cyan": (0.15, 0.78, 0.82),
    "blue": (0.15, 0.30, 0.88),
    "purple": (0.52, 0.20, 0.75),
    "pink": (0.96, 0.50, 0.70),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
}
MOTIONS: dict[str, tuple[float, float]] = {  # direction on the screen; y grows downwards
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "spinning clockwise": (0.0, 0.0),
    "spinning counterclockwise": (0.0, 0.0),
    "growing larger": (0.0, 0.0),
    "growing smaller": (0.0, 0.0),
    "standing still": (0.0, 0.0),
}
CAMERAS: dict[str, tuple[float, float, float]] = {  # how the background moves (x, y) and by how much it grows
    "pans left": (1.0, 0.0, 0.0),
    "pans right": (-1.0, 0.0, 0.0),
    "pans up": (0.0, 1.0, 0.0),
    "pans down": (0.0, -1.0, 0.0),
    "zooms in": (0.0, 0.0, 1.0),
    "zooms out": (0.0, 0.0, -1.0),
}
SIZES: dict[str, float] = {"small": 0.27, "large": 0.52}  # radius over half the shorter side of the frame
PLACES: dict[str, tuple[float, float]] = {
    "left": (-0.5, 0.0),
    "right": (0.5, 0.0),
    "top": (0.0, -0.5),
    "bottom": (0.0, 0.5),
    "center": (0.0, 0.0),
}
OPEN_NUMBERS = 10  # random numbers in [0, 1) that a layer has besides its words


# Textures: pixel coordinates (x, y), period and half extent in pixels, three phases -> [0, 1], 1 = second colour.
def _wave(x: Tensor, period: Tensor, phase: Tensor) -> Tensor:
    return torch.sin((x / period + phase) * (2 * math.pi))


def _sharp(wave: Tensor, period: Tensor) -> Tensor:
    """A sine as a square wave whose edges are about one pixel wide."""
    return (wave * period / math.pi).clamp(-1, 1) * 0.5 + 0.5


def _striped(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    return _sharp(_wave(x, period, phase[0]), period)


def _checkered(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    period = period * 1.4
    return _sharp(_wave(x, period, phase[0]) * _wave(y, period, phase[1]) * 1.5, period)


def _dotted(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    dx = torch.frac(x / period + phase[0] + 64) - 0.5
    dy = torch.frac(y / period + phase[1] + 64) - 0.5
    return ((0.3 - torch.sqrt(dx * dx + dy * dy + 1e-6)) * period + 0.5).clamp(0, 1)


def _zigzag(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    bend = (torch.frac(y / (period * 1.5) + phase[1] + 64) - 0.5).abs() * period * 1.5
    return _sharp(_wave(x + bend, period, phase[0]), period)


def _ringed(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    return _sharp(_wave(torch.sqrt(x * x + y * y + 1e-6), period, phase[0]), period)


def _marbled(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    bent = x + 0.35 * period * _wave(y, period * 2.3, phase[1]) + 0.3 * period * _wave(x + y, period * 3.1, phase[2])
    return 0.5 + 0.25 * _wave(bent, period * 1.5, phase[0]) + 0.25 * _wave(y - 0.6 * bent, period * 1.9, phase[2])


def _shaded(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    return (x / extent).clamp(-1, 1) * 0.5 + 0.5


def _solid(x: Tensor, y: Tensor, period: Tensor, extent: Tensor, phase: Tensor) -> Tensor:
    return torch.zeros_like(x)


TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "solid": _solid,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
    "zigzag": _zigzag,
    "ringed": _ringed,
    "marbled": _marbled,
    "shaded": _shaded,
}


# Shapes: coordinates in units of the shape's radius -> signed distance to the outline in the same unit, < 0 inside.
def _polygon(x: Tensor, y: Tensor, points: int, inner: float) -> Tensor:
    """A star whose outer corners have radius 1 (one of them at the top) and whose inner corners have radius `inner`."""
    half = math.pi / points
    angle = (torch.remainder(torch.atan2(x, -y) + half, 2 * half) - half).abs()
    radius = torch.sqrt(x * x + y * y + 1e-9)
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    along, across = radius * torch.cos(angle) - 1, radius * torch.sin(angle)
    return (along * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-9) - 0.92


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 0.95, short - 0.32)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _disc,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.78,
    "triangle": lambda x, y: _polygon(x, y - 0.12, 3, 0.5),
    "diamond": lambda x, y: (x.abs() * 1.6 + y.abs() - 1) / math.hypot(1.6, 1),
    "star": lambda x, y: _polygon(x, y, 5, 0.45),
    "ring": lambda x, y: (_disc(x, y) + 0.2).abs() - 0.2,
    "cross": _cross,
    "crescent": lambda x, y: torch.maximum(_disc(x, y), -_disc((x - 0.45) * 1.2, y * 1.2) / 1.2),
}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Shape:
    """One shape: its words, and the open numbers in [0, 1) that the words leave to chance."""

    colour: str
    texture: str
    shape: str
    motion: str
    size: str | None = None
    place: str | None = None
    open: tuple[float, ...] = (0.5,) * OPEN_NUMBERS

    def words(self) -> str:
        look = f"{self.size} {self.colour}" if self.size else self.colour
        place = f" at the {self.place}" if self.place else ""
        return f"{_article(look)} {look} {self.texture} {self.shape}{place} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """One or two shapes over a background; `camera` None is a camera at rest."""

    shapes: tuple[Shape, ...]
    colour: str
    texture: str
    camera: str | None = None
    open: tuple[float, ...] = (0.5,) * OPEN_NUMBERS

    def caption(self) -> str:
        """The scene in words, for example "a red striped circle moving right over a blue checkered background"."""
        shapes = " and ".join(shape.words() for shape in self.shapes)
        camera = f", camera {self.camera}" if self.camera else ""
        return f"{shapes} over {_article(self.colour)} {self.colour} {self.texture} background{camera}"


def _open(rng: random.Random) -> tuple[float, ...]:
    return tuple(rng.random() for _ in range(OPEN_NUMBERS))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene: one or two shapes, with or without sizes, places and camera. Deterministic from `rng`'s state."""
    count = 1 if rng.random() < 0.6 else 2
    colours = rng.sample(list(COLOURS), count + 1)
    sized, placed = rng.random() < 0.5, rng.random() < 0.5
    places = rng.sample([p for p in PLACES if p != "center"], 2) if count == 2 else [rng.choice(list(PLACES))]
    shapes = tuple(
        Shape(
            colour=colours[i],
            texture=rng.choice(list(TEXTURES)),
            shape=rng.choice(list(SHAPES)),
            motion=rng.choice(list(MOTIONS)),
            size=rng.choice(list(SIZES)) if sized else None,
            place=places[i] if placed else None,
            open=_open(rng),
        )
        for i in range(count)
    )
    camera = rng.choice(list(CAMERAS)) if rng.random() < 0.5 else None
    texture = rng.choice([t for t in TEXTURES if t != "solid"])
    return Scene(shapes, colours[-1], texture, camera, _open(rng))


def _two_colours(name: str, background: bool) -> tuple[float, ...]:
    """The texture's two colours (r, g, b, r, g, b). A background's are paler and closer, so that shapes stand out."""
    main = COLOURS[name]
    light = 0.3 * main[0] + 0.6 * main[1] + 0.1 * main[2] > 0.4
    other = tuple(0.3 * c if light else c + 0.65 * (1 - c) for c in main)
    if background:
        main = tuple(0.6 * c + 0.2 for c in main)  # type: ignore[assignment]
        other = tuple(0.55 * a + 0.45 * (0.6 * b + 0.2) for a, b in zip(main, other, strict=True))
    return (*main, *other)


def _anchor(shape: Shape, index: int, count: int) -> tuple[float, float]:
    """Where the middle of the shape's path is, in halves of the shorter side."""
    jitter_x, jitter_y = shape.open[0] - 0.5, shape.open[1] - 0.5
    if shape.place is not None:
        x, y = PLACES[shape.place]
        return x + 0.16 * jitter_x, y + 0.16 * jitter_y
    if count == 1:
        return 0.6 * jitter_x, 0.6 * jitter_y
    side = -0.45 if index == 0 else 0.45
    return side + 0.2 * jitter_x, 0.8 * jitter_y


def _texture_row(texture: str, colour: str, numbers: Sequence[float], background: bool) -> list[float]:
    angle = 2 * math.pi * numbers[5]
    period = 7 + 4 * numbers[6]
    kind = list(TEXTURES).index(texture)
    return [kind, period, angle, *numbers[7:10], *_two_colours(colour, background)]


def _shape_row(shape: Shape, index: int, count: int) -> list[float]:
    x, y = _anchor(shape, index, count)
    dx, dy = MOTIONS[shape.motion]
    travel = 0.9 + 0.3 * shape.open[2]
    radius = SIZES[shape.size] if shape.size else 0.33 + 0.14 * shape.open[3]
    radius *= 0.8 if count == 2 else 1.0
    growth = {"growing larger": 0.45, "growing smaller": -0.45}.get(shape.motion, 0.0)
    spin = {"spinning clockwise": 1.0, "spinning counterclockwise": -1.0}.get(shape.motion, 0.0)
    turn = (0.5 + 0.2 * shape.open[2]) * 2 * math.pi * spin
    tilt = (shape.open[4] - 0.5) * 0.5
    kind = list(SHAPES).index(shape.shape)
    row = [1.0, kind, x, y, dx * travel, dy * travel, radius, growth, tilt, turn]
    return row + _texture_row(shape.texture, shape.colour, shape.open, background=False)


SHAPE_COLUMNS = 10
TEXTURE_COLUMNS = 12
LAYER_COLUMNS = SHAPE_COLUMNS + TEXTURE_COLUMNS
ABSENT = [0.0] * 6 + [1.0] + [0.0] * 4 + [1.0] + [0.0] * 10  # a layer that covers nothing, with a radius and a period


def _row(scene: Scene) -> list[float]:
    """A scene's numbers: two shape layers (the second `ABSENT` in a scene of one), then camera, then background."""
    count = len(scene.shapes)
    row = [value for i, shape in enumerate(scene.shapes) for value in _shape_row(shape, i, count)]
    row += ABSENT * (2 - count)
    camera = CAMERAS[scene.camera] if scene.camera else (0.0, 0.0, 0.0)
    numbers = scene.open
    row += [*(c * (0.8 + 0.3 * numbers[0]) for c in camera), numbers[1] - 0.5, numbers[2] - 0.5]
    return row + _texture_row(scene.texture, scene.colour, numbers, background=True)


def _paint_texture(x: Tensor, y: Tensor, extent: Tensor, row: Tensor) -> Tensor:
    """Colours [B, 3, T, H, W] of a texture at pixel coordinates x, y [B, T, H, W]; row: [12, B, 1, 1, 1]."""
    kind, period, cos, sin = row[0], row[1], row[2].cos(), row[2].sin()
    x, y = x * cos + y * sin, y * cos - x * sin
    mix = torch.zeros_like(x)
    for index, texture in enumerate(TEXTURES.values()):
        mix = torch.where(kind == index, texture(x, y, period, extent, row[3:6]), mix)
    main, other = row[6:9].transpose(0, 1), row[9:12].transpose(0, 1)
    return main + (other - main) * mix.unsqueeze(1)


def _shape_layer(x: Tensor, y: Tensor, time: Tensor, half: float, row: Tensor) -> tuple[Tensor, Tensor]:
    """Colours [B, 3, T, H, W] and coverage [B, 1, T, H, W] of one shape; row: [22, B, 1, 1, 1]."""
    present, kind, x0, y0, dx, dy, radius, growth, tilt, turn = row[:SHAPE_COLUMNS]
    scale = (1 + growth * time * 2) * radius * half
    angle = tilt + turn * time
    x = (x - (x0 + dx * time) * half) / scale
    y = (y - (y0 + dy * time) * half) / scale
    x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = torch.ones_like(x)
    for index, outline in enumerate(SHAPES.values()):
        distance = torch.where(kind == index, outline(x, y), distance)
    cover = (0.5 - distance * scale).clamp(0, 1) * present
    size = radius * half
    return _paint_texture(x * size, y * size, size, row[SHAPE_COLUMNS:]), cover.unsqueeze(1)


def _background(x: Tensor, y: Tensor, time: Tensor, half: float, row: Tensor) -> Tensor:
    pan_x, pan_y, zoom, x0, y0 = row[:5]
    size = torch.exp(0.5 * zoom * time)
    x = (x - pan_x * time * half) / size - x0 * half
    y = (y - pan_y * time * half) / size - y0 * half
    return _paint_texture(x, y, torch.full_like(x0, half * 1.2), row[5:])


def render(
    scenes: Sequence[Scene], num_frames: int, height: int, width: int, device: str | torch.device = "cpu"
) -> Tensor:
    """Draw the scenes, anti-aliased: float32 [B, 3, num_frames, height, width] in [-1, 1] on `device`.

    Sizes and paths scale with the frame; textures keep their period in pixels. ValueError for a scene that has not one
    or two shapes, for no scene at all, and for a size below 1.
    """
    if not scenes or any(len(scene.shapes) not in (1, 2) for scene in scenes):
        raise ValueError("render needs at least one scene, and one or two shapes in each of them")
    if min(num_frames, height, width) < 1:
        raise ValueError(f"num_frames, height and width must be at least 1, got {(num_frames, height, width)}")
    table = torch.tensor([_row(scene) for scene in scenes], dtype=torch.float32)
    if torch.device(device).type == "cuda":
        table = table.pin_memory()  # so that the copy does not wait for the device's queue
    rows = table.to(device, non_blocking=True).T[:, :, None, None, None]
    half = min(height, width) / 2
    y = (torch.arange(height, device=device) + 0.5 - height / 2)[None, None, :, None]
    x = (torch.arange(width, device=device) + 0.5 - width / 2)[None, None, None, :]
    time = ((torch.arange(num_frames, device=device) + 0.5) / num_frames - 0.5)[None, :, None, None]
    video = _background(x, y, time, half, rows[2 * LAYER_COLUMNS :])
    for layer in range(2):
        row = rows[layer * LAYER_COLUMNS : (layer + 1) * LAYER_COLUMNS]
        colours, cover = _shape_layer(x, y, time, half, row)
        video = video + (colours - video) * cover
    return video * 2 - 1


def sample_batch(
    seed: int, batch_size: int, num_frames: int, height: int, width: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, list[str]]:
    """Draw `batch_size` scenes from `seed`: videos as `render` makes them, and their captions."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(batch_size)]
    return render(scenes, num_frames, height, width, device), [scene.caption() for scene in scenes]
