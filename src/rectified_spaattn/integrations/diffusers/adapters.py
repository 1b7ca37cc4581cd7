"""Which transformers are supported: one row a model class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the attention seam must know of one transformer class.

    attentions   the video self-attention modules in the order of the layers, as (name, module)
    grid         (T, H, W) in tokens, read from the transformer and its forward arguments
    text_first   True where text stands before the video in joint attention
    preset       name of the published preset, read from the transformer and its pipeline (None: transformer alone)
    """

    attentions: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    grid: Callable[[nn.Module, Mapping[str, Any]], Grid]
    text_first: bool
    preset: Callable[[nn.Module, Any], str]


def _attentions_of(**lists: str) -> Callable[[nn.Module], list[tuple[str, nn.Module]]]:
    """{block list: attribute of the self-attention in each block}, in the order given."""

    def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (f"{blocks}.{i}.{attribute}", getattr(block, attribute))
            for blocks, attribute in lists.items()
            for i, block in enumerate(getattr(model, blocks))
        ]

    return find


def _patched_grid(sample: torch.Tensor, patch: Grid) -> Grid:
    # [B, C, T, H, W] -> tokens along each axis
    t, h, w = (int(length) // side for length, side in zip(sample.shape[-3:], patch, strict=True))
    return t, h, w


def _hunyuan_grid(model: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    config: Any = model.config
    return _patched_grid(inputs["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))


def _wan_grid(model: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    config: Any = model.config
    return _patched_grid(inputs["hidden_states"], tuple(config.patch_size))


def _wan_preset(model: nn.Module, pipeline: Any) -> str:
    config: Any = model.config
    if getattr(getattr(pipeline, "config", None), "expand_timesteps", False) or config.in_channels == 48:
        return "wan2.2-ti2v-5b"
    from_image = config.image_dim is not None or config.in_channels > config.out_channels
    if getattr(pipeline, "transformer_2", None) is not None:
        return "wan2.2-i2v-a14b" if from_image else "wan2.2-t2v-a14b"
    return "wan2.1-i2v" if from_image else "wan2.1-t2v"


ADAPTERS: dict[str, Adapter] = {
    "HunyuanVideoTransformer3DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn", single_transformer_blocks="attn"),
        grid=_hunyuan_grid,
        text_first=False,
        preset=lambda model, pipeline: "hunyuan-video-t2v",
    ),
    "WanTransformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1"),
        grid=_wan_grid,
        text_first=False,
        preset=_wan_preset,
    ),
}


def adapter_for(model: nn.Module) -> Adapter:
    """The row for a transformer. Raises TypeError naming the supported classes where there is none."""
    name = type(model).__name__
    if name not in ADAPTERS:
        raise TypeError(
            f"enable: got a {name}; allowed: a diffusers pipeline with, or itself, one of {list(ADAPTERS)}. "
            "docs/models.md tells how to add a row for another model."
        )
    return ADAPTERS[name]
