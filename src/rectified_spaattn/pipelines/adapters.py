"""Which transformers are supported: one row a model class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import diffusers
from torch import nn

from ..config import SparseConfig
from ..presets import preset
from . import packed, tokens
from .refused import REFUSED
from .tokens import Inputs, Layouts, joint, joint_and_alone, joint_text


class Presets(NamedTuple):
    """Of a class whose weights decide. read: the one of a transformer and its pipeline (None: transformer alone)."""

    read: Callable[[nn.Module, Any], str]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the attention seam must know of one transformer class.

    attentions  the self-attention modules of video or images in the order of the layers, as (name, module)
    layouts     of the sequences that they attend over, told apart by their length, read from the transformer and its
                forward arguments; ValueError for tokens that have none
    padding     how many tokens at the end of the first are padding in the whole batch: left out of sparse calls
    timestep    the forward's argument that holds it
    text        the one that guidance calls differ by
    optional    block lists that a forward may leave out
    packed      all tokens, text included, are one tensor outside of attention
    preset      the name of its preset, or several with what chooses among them
    """

    attentions: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    layouts: Layouts
    padding: Callable[[Inputs], int] = tokens.no_text
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    optional: tuple[str, ...] = ()
    packed: bool = False
    preset: str | Presets = "image"

    def preset_of(self, model: nn.Module, pipeline: Any) -> str:
        """The name of the preset of a transformer. pipeline: None for the transformer alone."""
        return self.preset if isinstance(self.preset, str) else self.preset.read(model, pipeline)


def _attentions_of(**lists: str) -> Callable[[nn.Module], list[tuple[str, nn.Module]]]:
    """{block list: attribute of the self-attention in each block}, in the order given; both may be paths."""

    def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (f"{blocks}.{i}.{attribute}", attrgetter(attribute)(block))
            for blocks, attribute in lists.items()
            for i, block in enumerate(attrgetter(blocks)(model))
        ]

    return find


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


def _sd3_attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Some blocks of SD3.5 medium attend over the image alone, too."""
    blocks: Any = model.transformer_blocks
    return [
        (f"transformer_blocks.{i}.{name}", module)
        for i, block in enumerate(blocks)
        for name in ("attn", "attn2")
        if (module := getattr(block, name, None)) is not None
    ]


_JOINT = _attentions_of(transformer_blocks="attn", single_transformer_blocks="attn")
_WAN = _attentions_of(blocks="attn1")
_WAN_PRESETS = Presets(
    _wan_preset, ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b")
)
_ATTN = _attentions_of(transformer_blocks="attn")
_ATTN1 = _attentions_of(transformer_blocks="attn1")
_TEXT = joint_text("encoder_hidden_states")
_FLUX = Adapter(attentions=_JOINT, layouts=joint(tokens.image_grid, _TEXT, text_first=True))

ADAPTERS: dict[str, Adapter] = {
    "HunyuanVideoTransformer3DModel": Adapter(
        attentions=_JOINT, layouts=joint(tokens.video_grid, _TEXT), preset="hunyuan-video-t2v"
    ),
    "HunyuanVideo15Transformer3DModel": Adapter(
        attentions=_ATTN,
        layouts=joint(tokens.video_grid, joint_text(*tokens.HUNYUAN15_TEXT)),
        padding=tokens.hunyuan15_padding,
        preset="hunyuan-video-t2v",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Adapter(
        attentions=_JOINT, layouts=packed.framepack, preset="hunyuan-video-t2v"
    ),
    "WanTransformer3DModel": Adapter(attentions=_WAN, layouts=joint(tokens.video_grid), preset=_WAN_PRESETS),
    "WanVACETransformer3DModel": Adapter(
        attentions=_attentions_of(blocks="attn1", vace_blocks="attn1"),
        layouts=joint(tokens.video_grid),
        preset=_WAN_PRESETS,
    ),
    "WanAnimateTransformer3DModel": Adapter(attentions=_WAN, layouts=joint(tokens.video_grid), preset="wan2.1-i2v"),
    "SkyReelsV2Transformer3DModel": Adapter(
        attentions=_WAN, layouts=joint(tokens.bidirectional_grid), preset=_WAN_PRESETS._replace(read=_skyreels_preset)
    ),
    "ChronoEditTransformer3DModel": Adapter(attentions=_WAN, layouts=joint(tokens.video_grid), preset="wan2.1-i2v"),
    "AnyFlowTransformer3DModel": Adapter(attentions=_WAN, layouts=joint(tokens.frames_first_grid), preset="wan2.1-t2v"),
    "CogVideoXTransformer3DModel": Adapter(
        attentions=_ATTN1,
        layouts=joint(tokens.frames_first_grid, _TEXT, text_first=True),
        preset=Presets(_cogvideox_preset, ("cogvideox1.5-t2v", "cogvideox1.5-i2v")),
    ),
    "ConsisIDTransformer3DModel": Adapter(
        attentions=_ATTN1, layouts=joint(tokens.frames_first_grid, _TEXT, text_first=True), preset="cogvideox1.5-i2v"
    ),
    "LTXVideoTransformer3DModel": Adapter(attentions=_ATTN1, layouts=joint(tokens.named_grid), preset="video"),
    "LTX2VideoTransformer3DModel": Adapter(attentions=_ATTN1, layouts=joint(tokens.named_grid), preset="video"),
    "MiniMaxH3Transformer3DModel": Adapter(attentions=_ATTN, layouts=packed.minimax_h3, packed=True, preset="video"),
    "Kandinsky5Transformer3DModel": Adapter(
        attentions=_attentions_of(visual_transformer_blocks="self_attention"),
        layouts=joint(tokens.fractal_grid),
        preset="video",
    ),
    "Kandinsky6Transformer3DModel": Adapter(
        attentions=_attentions_of(visual_transformer_blocks="video_dec_block.self_attention"),
        layouts=joint(tokens.channels_last_grid),
        preset="video",
    ),
    "Kandinsky6SRTransformer3DModel": Adapter(
        attentions=_attentions_of(visual_transformer_blocks="self_attention"),
        layouts=joint(tokens.reordered_grid),
        preset="video",
    ),
    "CosmosTransformer3DModel": Adapter(attentions=_ATTN1, layouts=joint(tokens.video_grid), preset="video"),
    "Cosmos3OmniTransformer": Adapter(
        attentions=_attentions_of(layers="self_attn"),
        layouts=packed.cosmos3,
        timestep="vision_timesteps",
        text="input_ids",
        preset="video",
    ),
    "MotifVideoTransformer3DModel": Adapter(attentions=_JOINT, layouts=packed.motif_video, preset="video"),
    "MochiTransformer3DModel": Adapter(attentions=_ATTN1, layouts=joint(tokens.video_grid, _TEXT), preset="video"),
    "AllegroTransformer3DModel": Adapter(attentions=_ATTN1, layouts=joint(tokens.video_grid), preset="video"),
    "EasyAnimateTransformer3DModel": Adapter(
        attentions=_ATTN1,
        layouts=joint(
            tokens.video_grid, joint_text("encoder_hidden_states", "encoder_hidden_states_t5"), text_first=True
        ),
        preset="video",
    ),
    "FluxTransformer2DModel": replace(_FLUX, preset="flux.1-dev-4096"),
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": Adapter(
        attentions=_attentions_of(
            **{"mode_blocks.image": "attn", "mode_blocks.image_cond": "attn", "single_transformer_blocks": "attn"}
        ),
        layouts=packed.flux3,
        optional=("mode_blocks.image_cond",),
    ),
    "QwenImageTransformer2DModel": Adapter(attentions=_ATTN, layouts=joint(tokens.shapes_grid, _TEXT, text_first=True)),
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": _FLUX,
    "JoyImageEditTransformer3DModel": Adapter(
        attentions=_attentions_of(double_blocks="attn"), layouts=joint(tokens.items_grid, _TEXT)
    ),
    "JoyImageEditPlusTransformer3DModel": Adapter(
        attentions=_attentions_of(double_blocks="attn"), layouts=joint(tokens.packed_count, _TEXT)
    ),
    "HunyuanImageTransformer2DModel": Adapter(
        attentions=_JOINT,
        layouts=joint(tokens.picture_grid, joint_text("encoder_hidden_states", "encoder_hidden_states_2")),
    ),
    "ErnieImageTransformer2DModel": Adapter(
        attentions=_attentions_of(layers="self_attention"),
        layouts=joint(tokens.picture_grid, joint_text("text_bth")),
        text="text_bth",
    ),
    "ZImageTransformer2DModel": Adapter(
        attentions=_attentions_of(noise_refiner="attention", layers="attention"),
        layouts=packed.z_image,
        timestep="t",
        text="cap_feats",
    ),
    "Krea2Transformer2DModel": Adapter(attentions=_ATTN, layouts=joint(tokens.positions_grid, _TEXT, text_first=True)),
    "Ideogram4Transformer2DModel": Adapter(attentions=_attentions_of(layers="attention"), layouts=packed.ideogram4),
    "SD3Transformer2DModel": Adapter(attentions=_sd3_attentions, layouts=joint_and_alone(tokens.picture_grid, _TEXT)),
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


def default_configs(model: nn.Module, pipeline: Any, name: str | None = None) -> tuple[SparseConfig, ...]:
    """The preset `name`, or else the one that fits a transformer."""
    return preset(adapter_for(model).preset_of(model, pipeline) if name is None else name)


class SupportedModel(NamedTuple):
    """One transformer class of diffusers.

    transformer  name of the class; a pipeline that has one can be enabled
    presets      names in PRESETS that `enable` chooses from
    """

    transformer: str
    presets: tuple[str, ...]


def supported() -> list[SupportedModel]:
    """All that `enable` takes, in the order of docs/models.md."""
    return [
        SupportedModel(name, (row.preset,) if isinstance(row.preset, str) else row.preset.names)
        for name, row in ADAPTERS.items()
    ]
