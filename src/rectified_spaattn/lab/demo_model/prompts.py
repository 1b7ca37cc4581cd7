"""Captions for the demo and for experiments: fixed ones, and pairs of caption and seed to tune on and to hold out."""

import random

from .data import CAPTION_LENGTH, sample_scene

# Never trained on by name.
PROMPTS: tuple[str, ...] = (
    "a large red striped circle moving right over a blue checkered background",
    "a large yellow dotted star spinning clockwise over a purple marbled background, camera pans left",
    "a green solid triangle growing larger over a pink dotted background",
    "a white checkered square moving down over a red zigzag background, camera zooms in",
    "a cyan ringed diamond at the left standing still over an orange striped background, camera pans up",
    "a large black marbled cross spinning counterclockwise over a white shaded background",
    "an orange zigzag ring moving left over a green ringed background",
    "a pink shaded crescent at the top moving right over a blue marbled background, camera pans right",
    "a blue striped square moving up and a red solid circle moving down over a yellow dotted background",
    "a large white dotted circle growing smaller and a small black solid star spinning clockwise "
    "over a cyan striped background",
    "a purple ringed circle at the left moving right and a yellow solid triangle at the right moving left "
    "over a black checkered background",
    "a small red solid star at the top moving down and a large green striped ring at the bottom standing still "
    "over a purple shaded background, camera zooms out",
    "a yellow solid cross standing still and a white striped diamond growing larger over a green zigzag background, "
    "camera pans down",
    "a small pink solid circle moving right over a black ringed background",
)

DEV_PAIRS, HELD_OUT_PAIRS = 24, 16
_DEV_DRAW, _HELD_OUT_DRAW = "dev", "held-out"


def drawn_captions(count: int, draw: str) -> tuple[str, ...]:
    """Captions from the training data's grammar, all different and none of PROMPTS; the same for the same `draw`."""
    rng = random.Random(draw)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = sample_scene(rng).caption()
        if caption not in PROMPTS and len(caption.split()) < CAPTION_LENGTH:
            captions[caption] = None
    return tuple(captions)


def split_pairs(split: str) -> tuple[tuple[str, int], ...]:
    """(prompt, seed) pairs that settings are compared on ("dev", 24) or that are looked at once, at the end
    ("held-out", 16). Raises ValueError for another name.
    """
    if split == "dev":
        prompts, seed = PROMPTS + drawn_captions(DEV_PAIRS - len(PROMPTS), _DEV_DRAW), 0
    elif split == "held-out":
        prompts, seed = drawn_captions(HELD_OUT_PAIRS, _HELD_OUT_DRAW), 1
    else:
        raise ValueError(f"split: got {split!r}; allowed: dev or held-out.")
    return tuple((prompt, seed) for prompt in prompts)
