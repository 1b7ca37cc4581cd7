"""Which transformers are supported: one row a model class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from ..config import SparseConfig
from ..presets import preset as preset_of
from . import tokens
from .tokens import Grid, Inputs

Preset = Callable[[nn.Module, Any], str | None]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the attention seam must know of one transformer class.

    attentions   the video self-attention modules in the order of the layers, as (name, module)
    grid         (T, H, W) in tokens, read from the transformer and its forward arguments; ValueError for tokens that
                 are no such grid
    text         number of text tokens in joint attention, padding included, read from the forward arguments
    padding      how many of them, at the end of the sequence, are padding in the whole batch: left out of sparse calls
    text_first   True where text stands before the video in joint attention
    preset       name of the preset, read from the transformer and its pipeline (None: transformer alone); None
                 where nothing was published for this model or one of its family
    """

    attentions: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    grid: Callable[[nn.Module, Inputs], Grid]
    text: Callable[[Inputs], int] = tokens.no_text
    padding: Callable[[Inputs], int] = tokens.no_text
    text_first: bool = False
    preset: Preset = lambda model, pipeline: None


def _attentions_of(**lists: str) -> Callable[[nn.Module], list[tuple[str, nn.Module]]]:
    """{block list: attribute of the self-attention in each block}, in the order given."""

    def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (f"{blocks}.{i}.{attribute}", getattr(block, attribute))
            for blocks, attribute in lists.items()
            for i, block in enumerate(getattr(model, blocks))
        ]

    return find


def _always(name: str) -> Preset:
    return lambda model, pipeline: name


def _wan_preset(model: nn.Module, pipeline: Any) -> str:
    config: Any = model.config
    if getattr(getattr(pipeline, "config", None), "expand_timesteps", False) or config.in_channels == 48:
        return "wan2.2-ti2v-5b"
    from_image = config.image_dim is not None or config.in_channels > config.out_channels
    if _is_expert(model, pipeline):
        return "wan2.2-i2v-a14b" if from_image else "wan2.2-t2v-a14b"
    return "wan2.1-i2v" if from_image else "wan2.1-t2v"


def _is_expert(model: nn.Module, pipeline: Any) -> bool:
    """Whether a Wan transformer is one of the two experts of Wan 2.2 A14B, also where it is enabled without the other.

    Raises ValueError for a 14B transformer alone of which nothing tells whether it is Wan 2.1 or an expert of Wan 2.2.
    """
    if pipeline is not None:
        boundary = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
        return boundary is not None or getattr(pipeline, "transformer_2", None) is not None
    config: Any = model.config
    path = checkpoint(model)
    if path.endswith("transformer_2") or "wan2.2" in path:
        return True
    if type(model).__name__ == "WanTransformer3DModel" and config.in_channels > config.out_channels:
        return config.image_dim is None  # Wan 2.1 sees the image by CLIP, too
    if config.num_layers == 40 and not path:
        raise ValueError(
            f"enable: got a {type(model).__name__} of 40 layers alone, which is Wan 2.1 14B or an expert of Wan 2.2 "
            "A14B; allowed: the pipeline, preset='wan2.1-t2v', or for an expert "
            "config=rsa.preset('wan2.2-t2v-a14b')[0] (the one for high noise) or [1] (the one for low noise)."
        )
    return False


def checkpoint(model: nn.Module) -> str:
    """Where a transformer was loaded from, in lower case; empty where it was not."""
    config: Any = model.config
    return str(getattr(config, "_name_or_path", "") or "").lower().rstrip("/\\")


def _skyreels_preset(model: nn.Module, pipeline: Any) -> str:
    # Diffusion forcing gives each frame a scheduler of its own, so no step is known and a warm-up would never end.
    if "DiffusionForcing" in type(pipeline).__name__:
        return "wan2.1-i2v"
    return _wan_preset(model, pipeline)


def _cogvideox_preset(model: nn.Module, pipeline: Any) -> str:
    config: Any = model.config
    return "cogvideox1.5-i2v" if config.in_channels > config.out_channels else "cogvideox1.5-t2v"


_JOINT = _attentions_of(transformer_blocks="attn", single_transformer_blocks="attn")

ADAPTERS: dict[str, Adapter] = {
    "HunyuanVideoTransformer3DModel": Adapter(
        attentions=_JOINT,
        grid=tokens.video_grid,
        text=tokens.joint_text("encoder_hidden_states"),
        preset=_always("hunyuan-video-t2v"),
    ),
    "HunyuanVideo15Transformer3DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn"),
        grid=tokens.video_grid,
        text=tokens.joint_text(*tokens.HUNYUAN15_TEXT),
        padding=tokens.hunyuan15_padding,
        preset=_always("hunyuan-video-t2v"),
    ),
    "WanTransformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1"), grid=tokens.video_grid, preset=_wan_preset
    ),
    "WanVACETransformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1", vace_blocks="attn1"), grid=tokens.video_grid, preset=_wan_preset
    ),
    "WanAnimateTransformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1"), grid=tokens.video_grid, preset=_always("wan2.1-i2v")
    ),
    "SkyReelsV2Transformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1"), grid=tokens.bidirectional_grid, preset=_skyreels_preset
    ),
    "CogVideoXTransformer3DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn1"),
        grid=tokens.frames_first_grid,
        text=tokens.joint_text("encoder_hidden_states"),
        text_first=True,
        preset=_cogvideox_preset,
    ),
    "LTXVideoTransformer3DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn1"), grid=tokens.named_grid
    ),
    "LTX2VideoTransformer3DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn1"), grid=tokens.named_grid
    ),
    "FluxTransformer2DModel": Adapter(
        attentions=_JOINT,
        grid=tokens.image_grid,
        text=tokens.joint_text("encoder_hidden_states"),
        text_first=True,
        preset=_always("flux.1-dev-4096"),
    ),
    "Flux2Transformer2DModel": Adapter(
        attentions=_JOINT,
        grid=tokens.image_grid,
        text=tokens.joint_text("encoder_hidden_states"),
        text_first=True,
    ),
    "QwenImageTransformer2DModel": Adapter(
        attentions=_attentions_of(transformer_blocks="attn"),
        grid=tokens.single_shape_grid,
        text=tokens.joint_text("encoder_hidden_states"),
        text_first=True,
    ),
}

# Classes somebody may well try, and why they have no row.
REFUSED: dict[str, str] = {
    "HunyuanVideoFramepackTransformer3DModel": "its history tokens stand before the video and its text after it, and "
    "one grid takes other tokens on one side only",
    "WanAnimate2Transformer3DModel": "it attends through a key-value cache, frame block by frame block",
    "QwenImage21Transformer2DModel": "its text and image tokens are packed into one masked sequence",
}


def adapter_for(model: nn.Module) -> Adapter:
    """The row for a transformer of a supported class of diffusers, or of a subclass of one.

    Raises TypeError naming the supported classes where there is none.
    """
    name, why = type(model).__name__, ""
    for kind in type(model).__mro__:
        known = kind.__name__ in ADAPTERS or kind.__name__ in REFUSED
        if known and kind is getattr(diffusers, kind.__name__, None):
            if kind.__name__ in ADAPTERS:
                return ADAPTERS[kind.__name__]
            why = f" ({REFUSED[kind.__name__]})"
            break
    if not why and name in ADAPTERS:
        why = f" ({type(model).__module__}.{name}, another class than diffusers')"
    raise TypeError(
        f"enable: got a {name}{why}; allowed: a diffusers pipeline with, or itself, one of {list(ADAPTERS)}. "
        "docs/models.md tells how to add a row for another model."
    )


def default_configs(
    model: nn.Module, pipeline: Any, overrides: Mapping[str, Any], name: str | None = None
) -> tuple[SparseConfig, ...]:
    """The preset `name`, or else the one that fits a transformer; without any, SparseConfig's defaults.

    Raises ValueError where nothing was published and the overrides leave sparsity and tolerance open.
    """
    name = name or adapter_for(model).preset(model, pipeline)
    if name is not None:
        return preset_of(name)
    if {"sparsity", "tolerance"} & set(overrides):
        return (SparseConfig(),)
    raise ValueError(
        f"enable: no settings were published for {type(model).__name__}, so none is chosen for you; allowed: "
        "sparsity=..., tolerance=..., config=SparseConfig(...) or preset=... by name. Try sparsity=0.8 and look at the "
        "result."
    )
