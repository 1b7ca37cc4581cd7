"""The words of the demo model's captions, and how they are put together: as in all captions that it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
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
ACROSS = ("left", "right", "enter left", "enter right", "leave left", "leave right")
PAIRED = ("circle", "hit")  # motions that need a second object, and name it
_ROLLING = {"sphere": (*ACROSS, "closer", "away", "hit"), "cylinder": ("closer", "away")}


@dataclass(frozen=True)
class Solid:
    """One object in words: "red", "metal", "sphere"."""

    colour: str
    material: str
    shape: str

    def words(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.material} {self.shape}"


def rolls(shape: str, motion: str) -> bool:
    """Whether an object of that shape rolls where others slide."""
    return motion in _ROLLING.get(shape, ())


def places(motion: str) -> tuple[str, ...]:
    """Where the main object may be, seen from a second one."""
    return ("in front of", "behind") if motion in ACROSS else ("next to",)


def caption(
    solids: Sequence[Solid], motion: str, place: str | None, floor: str, camera: str | None = None, sunset: bool = False
) -> str:
    """For example "a red metal sphere rolls right behind a blue matte cube, grey floor, camera orbits left".

    solids: one to three, the main one first; place: None without a second one and where the motion names it.
    """
    words = [solid.words() for solid in solids]
    other = words[1] if len(words) > 1 else ""
    go = "rolls" if rolls(solids[0].shape, motion) else "slides"
    main = f"{words[0]} {MOTIONS[motion].format(go=go, other=other)}"
    second = f" {place} {other}" if place else ""
    third = f" and {words[2]}" if len(words) > 2 else ""
    return f"{main}{second}{third}, {floor} floor{' at sunset' if sunset else ''}" + (
        f", camera {camera}" if camera else ""
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
