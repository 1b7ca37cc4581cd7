"""Which cache of diffusers runs on which transformer class, and how tests set it up.

The first of SeaCache, FirstBlockCache, MagCache and TaylorSeer that leaves something out on the untouched class:
SeaCache reads the video itself, FirstBlockCache needs no calibration, MagCache does, and TaylorSeer's lite mode leaves
out whole steps by their number. model_tables.py writes it into docs/models.md; test_cache_composition.py runs each.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig

STEPS = 4
CACHES: dict[str, Callable[[], Any]] = {
    "SeaCache": lambda: SeaCacheConfig(threshold=1e9),
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=1e9),
    "MagCache": lambda: MagCacheConfig(
        threshold=1e9,
        max_skip_steps=2,
        retention_ratio=0.25,
        num_inference_steps=STEPS,
        mag_ratios=torch.ones(STEPS),
    ),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
}
_OF_NAME = {
    "SeaCache": "Wan Cosmos3Omni",
    "FirstBlockCache": "WanVACE HunyuanVideo HunyuanVideoFramepack CogVideoX LTXVideo Mochi Flux QwenImage "
    "HunyuanImage",
    "MagCache": "Kandinsky5 MotifVideo Flux2",
    "TaylorSeer": "WanAnimate SkyReelsV2 ChronoEdit HunyuanVideo15 LTX2Video MiniMaxH3 Kandinsky6 Allegro LongCatImage "
    "OvisImage Bria",
}


def cache_of(kind: str) -> str | None:
    """The cache of a transformer class, by its name; None where diffusers has none for it."""
    model = kind.partition("Transformer")[0]
    return next((cache for cache, models in _OF_NAME.items() if model in models.split()), None)
