"""Captions for showing the model and for studies: fixed ones, and pairs to tune on and to hold out."""

from __future__ import annotations

from .feed import sample_scenes

PROMPTS: tuple[str, ...] = (
    "a red metal sphere rolls right in front of a blue striped cube, checkered floor",
    "a yellow striped cylinder spins, grey floor, camera orbits left",
    "a green matte cube bounces next to a purple glass sphere, sandy floor",
    "an orange checkered sphere rolls closer, checkered floor at sunset",
    "a blue metal sphere circles around a white striped cone, grey floor",
    "a cyan matte cone stands still next to a red checkered cube, checkered floor, camera orbits right",
    "a white checkered sphere hits a red matte cube, sandy floor",
    "a purple glass cube slides left in front of a yellow matte sphere and a green metal cone, grey floor",
    "a red checkered cylinder drops from above, checkered floor, camera moves in",
    "a green striped sphere comes in from the left, sandy floor at sunset",
    "a blue checkered cube leaves to the right behind an orange metal cone, grey floor",
    "a white metal sphere rolls away next to a purple striped cylinder, checkered floor at sunset, camera orbits left",
    "a yellow glass sphere bounces, checkered floor",
    "an orange striped cube spins next to a cyan metal sphere, sandy floor, camera moves out",
)

DEV_PAIRS, HELD_OUT_PAIRS = 24, 16


def drawn_captions(count: int, draw: str) -> tuple[str, ...]:
    """Captions that scenes of training could have, all different and none of PROMPTS; the same for the same `draw`."""
    captions = dict.fromkeys(scene.caption() for scene in sample_scenes(draw, 2 * count))
    return tuple([caption for caption in captions if caption not in PROMPTS][:count])


def split_pairs(split: str) -> tuple[tuple[str, int], ...]:
    """(prompt, seed) pairs that settings are compared on ("dev", 24) or that are looked at once, at the end
    ("held-out", 16). Raises ValueError for another name.
    """
    if split == "dev":
        prompts, seed = PROMPTS + drawn_captions(DEV_PAIRS - len(PROMPTS), "dev"), 0
    elif split == "held-out":
        prompts, seed = drawn_captions(HELD_OUT_PAIRS, "held-out"), 1
    else:
        raise ValueError(f"split: got {split!r}; allowed: dev or held-out.")
    return tuple((prompt, seed) for prompt in prompts)
