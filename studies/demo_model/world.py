"""Small worlds in words: a main object that moves, one or two others, a floor, a sky and a camera.

A scene is what its caption says (words) and what the caption leaves open (`open`, numbers in [0, 1)). `motion.py` turns
both into poses, `render.py` into pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rectified_spaattn.lab.demo_model import words
from rectified_spaattn.lab.demo_model.words import (
    CAMERAS,
    FLOORS,
    MATERIALS,
    MOTIONS,
    PAIRED,
    SHAPES,
    Solid,
)

_RGB = (
    (0.84, 0.10, 0.10),
    (0.98, 0.50, 0.05),
    (0.96, 0.86, 0.12),
    (0.10, 0.62, 0.20),
    (0.10, 0.78, 0.82),
    (0.12, 0.25, 0.88),
    (0.52, 0.16, 0.74),
    (0.96, 0.96, 0.96),
)
COLOURS: dict[str, tuple[float, float, float]] = dict(zip(words.COLOURS, _RGB, strict=True))
OPEN_NUMBERS = 24

_SHOWS_SPIN = ("striped", "checkered")


@dataclass(frozen=True)
class Scene:
    """One to three objects, the main one first; `place` is None without a second one and where the motion names it."""

    solids: tuple[Solid, ...]
    motion: str
    place: str | None
    floor: str
    camera: str | None = None
    sunset: bool = False
    open: tuple[float, ...] = (0.5,) * OPEN_NUMBERS

    @property
    def rolls(self) -> bool:
        return words.rolls(self.solids[0].shape, self.motion)

    def caption(self) -> str:
        """For example "a red metal sphere rolls right behind a blue matte cube, grey floor, camera orbits left"."""
        return words.caption(self.solids, self.motion, self.place, self.floor, self.camera, self.sunset)


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene, deterministic from `rng`'s state. Every motion, colour and material is as likely as any other."""
    motion = rng.choice(list(MOTIONS))
    count = rng.choices((1, 2, 3), (0.4, 0.42, 0.18))[0]
    count = max(count, 2) if motion in PAIRED else count
    colours = rng.sample(list(COLOURS), count)
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    materials = [rng.choice(MATERIALS) for _ in range(count)]
    if motion == "spin" and shapes[0] != "cube":
        materials[0] = rng.choice(_SHOWS_SPIN)
    return Scene(
        solids=tuple(Solid(*each) for each in zip(colours, materials, shapes, strict=True)),
        motion=motion,
        place=rng.choice(words.places(motion)) if count > 1 and motion not in PAIRED else None,
        floor=rng.choice(FLOORS),
        camera=rng.choice(CAMERAS) if rng.random() < 0.5 else None,
        sunset=rng.random() < 0.25,
        open=tuple(rng.random() for _ in range(OPEN_NUMBERS)),
    )
