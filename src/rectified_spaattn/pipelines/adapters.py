"""Which transformers are supported: one row a model class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import SparseConfig
from ..config import preset as preset_of
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
    if getattr(pipeline, "transformer_2", None) is not None:
        return "wan2.2-i2v-a14b" if from_image else "wan2.2-t2v-a14b"
    return "wan2.1-i2v" if from_image else "wan2.1-t2v"


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
    """The row for a transformer. Raises TypeError naming the supported classes where there is none."""
    name = type(model).__name__
    if name not in ADAPTERS:
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise TypeError(
            f"enable: got a {name}{why}; allowed: a diffusers pipeline with, or itself, one of {list(ADAPTERS)}. "
            "docs/models.md tells how to add a row for another model."
        )
    return ADAPTERS[name]


def default_configs(model: nn.Module, pipeline: Any, overrides: Mapping[str, Any]) -> tuple[SparseConfig, ...]:
    """The preset that fits a transformer. Where there is none, SparseConfig's defaults, if sparsity is overridden.

    Raises ValueError where nothing was published and the overrides leave the sparsity open.
    """
    name = adapter_for(model).preset(model, pipeline)
    if name is not None:
        return preset_of(name)
    if "sparsity" in overrides:
        return (SparseConfig(),)
    raise ValueError(
        f"enable: no settings were published for {type(model).__name__}, so none is chosen for you; allowed: "
        "sparsity=..., config=SparseConfig(...) or preset=... by name. Try sparsity=0.8 and look at the result."
    )
