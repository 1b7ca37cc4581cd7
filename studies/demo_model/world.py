"""Small worlds in words: a main object that moves, one or two others, a floor, a sky and a camera.

A scene is what its caption says (words) and what the caption leaves open (`open`, numbers in [0, 1)). `motion.py` turns
both into poses, `render.py` into pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.10, 0.62, 0.20),
    "cyan": (0.10, 0.78, 0.82),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.52, 0.16, 0.74),
    "white": (0.96, 0.96, 0.96),
}
MATERIALS = ("matte", "metal", "glass", "striped", "checkered")
SHAPES = ("sphere", "cube", "cylinder", "cone")
MOTIONS: dict[str, str] = {  # {go} is "rolls" or "slides", {other} the second object
    "still": "stands still",
    "left": "{go} left",
    "right": "{go} right",
    "closer": "{go} closer",
    "away": "{go} away",
    "bounce": "bounces",
    "spin": "spins",
    "drop": "drops from above",
    "enter left": "comes in from the left",
    "enter right": "comes in from the right",
    "leave left": "leaves to the left",
    "leave right": "leaves to the right",
    "circle": "circles around {other}",
    "hit": "hits {other}",
}
PLACES = ("in front of", "behind", "next to")  # of the main object, seen from the second one
CAMERAS = ("orbits left", "orbits right", "moves in", "moves out")
FLOORS = ("grey", "sandy", "checkered")
OPEN_NUMBERS = 24

ACROSS = ("left", "right", "enter left", "enter right", "leave left", "leave right")
_PAIRED = ("circle", "hit")
_ROLLING = {"sphere": (*ACROSS, "closer", "away", "hit"), "cylinder": ("closer", "away")}
_SHOWS_SPIN = ("striped", "checkered")


@dataclass(frozen=True)
class Solid:
    """One object in words: "red", "metal", "sphere"."""

    colour: str
    material: str
    shape: str

    def words(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.material} {self.shape}"


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
        return self.motion in _ROLLING.get(self.solids[0].shape, ())

    def caption(self) -> str:
        """For example "a red metal sphere rolls right behind a blue matte cube, grey floor, camera orbits left"."""
        words = [solid.words() for solid in self.solids]
        other = words[1] if len(words) > 1 else ""
        main = f"{words[0]} {MOTIONS[self.motion].format(go='rolls' if self.rolls else 'slides', other=other)}"
        second = f" {self.place} {other}" if self.place else ""
        third = f" and {words[2]}" if len(words) > 2 else ""
        sunset = " at sunset" if self.sunset else ""
        camera = f", camera {self.camera}" if self.camera else ""
        return f"{main}{second}{third}, {self.floor} floor{sunset}{camera}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _places(motion: str) -> tuple[str, ...]:
    if motion in ACROSS:
        return ("in front of", "behind")
    return ("next to",)


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene, deterministic from `rng`'s state. Every motion, colour and material is as likely as any other."""
    motion = rng.choice(list(MOTIONS))
    count = rng.choices((1, 2, 3), (0.4, 0.42, 0.18))[0]
    count = max(count, 2) if motion in _PAIRED else count
    colours = rng.sample(list(COLOURS), count)
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    materials = [rng.choice(MATERIALS) for _ in range(count)]
    if motion == "spin" and shapes[0] != "cube":
        materials[0] = rng.choice(_SHOWS_SPIN)
    return Scene(
        solids=tuple(Solid(*each) for each in zip(colours, materials, shapes, strict=True)),
        motion=motion,
        place=rng.choice(_places(motion)) if count > 1 and motion not in _PAIRED else None,
        floor=rng.choice(FLOORS),
        camera=rng.choice(CAMERAS) if rng.random() < 0.5 else None,
        sunset=rng.random() < 0.25,
        open=tuple(rng.random() for _ in range(OPEN_NUMBERS)),
    )
