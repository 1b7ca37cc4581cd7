"""Which transformers TeaCache knows: one row a model class, and the published fit of each checkpoint."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn

from ..adapters import ADAPTERS

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A polynomial that turns the change of the signal into the change of the output, fitted to one checkpoint.

    name          which checkpoint it was fitted to
    coefficients  highest power first
    threshold     the default: how much predicted change may add up before a step is computed
    first_steps   denoising steps at the start of a run that are always computed
    last_steps    the same at its end
    """

    name: str
    coefficients: tuple[float, ...]
    threshold: float
    first_steps: int = 1
    last_steps: int = 1

    def distance(self, change: float) -> float:
        """The predicted relative change of the output for a relative change of the signal."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """What TeaCache must know of one transformer class.

    blocks  attributes of the lists of blocks that are skipped, in the order they run
    signal  the tensor whose change is watched, made from the first block and its arguments by name
    fit     the fit for a transformer and its pipeline (None: transformer alone); TypeError where none was published
    """

    blocks: tuple[str, ...]
    signal: Callable[[nn.Module], Callable[[Arguments], torch.Tensor]]
    fit: Callable[[nn.Module, Any], Fit]


def _modulated_input(block: nn.Module) -> Callable[[Arguments], torch.Tensor]:
    """[B, S, C]: what the first block's attention would see of the video."""
    registry: Any = getattr(block, "_diffusers_hook", None)
    if registry is not None and registry.get_hook("group_offloading") is not None:
        raise RuntimeError(
            "TeaCache: this model is offloaded block by block, but whether the blocks are needed shows only in the "
            "first one's norm. Use enable_group_offload(..., offload_type='leaf_level'), or disable TeaCache."
        )
    norm: Any = block.norm1
    wanted = inspect.signature(type(norm).forward).parameters
    # HunyuanVideo from an image; the block calls the second num_tokens
    extra = {"token_replace_emb": "token_replace_emb", "first_frame_num_tokens": "num_tokens"}
    extra = {name: argument for name, argument in extra.items() if name in wanted}

    def signal(arguments: Arguments) -> torch.Tensor:
        given = {name: arguments[argument] for name, argument in extra.items()}
        modulated: torch.Tensor = norm(arguments["hidden_states"], emb=arguments["temb"], **given)[0]
        return modulated

    return signal


def _time_embedding(block: nn.Module) -> Callable[[Arguments], torch.Tensor]:
    """CogVideoX: [B, C]. Wan: its projection to the six modulations, [B, 6, C], which the published fits are of."""

    def signal(arguments: Arguments) -> torch.Tensor:
        temb: torch.Tensor = arguments["temb"]
        # Wan 2.2 TI2V gives every token a timestep; a given first frame stands still, the last is being denoised
        return temb[:, -1] if temb.ndim == 4 else temb

    return signal


_HUNYUAN = Fit(
    name="HunyuanVideo",
    coefficients=(7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    threshold=0.15,
)
_FLUX = Fit(
    name="FLUX.1-dev",
    coefficients=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    threshold=0.8,
)
_COGVIDEOX_T2V = Fit(
    name="CogVideoX1.5-5B",
    coefficients=(2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    threshold=0.2,
)
_COGVIDEOX_I2V = Fit(
    name="CogVideoX1.5-5B-I2V",
    coefficients=(1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
    threshold=0.2,
)
_WAN_SMALL = Fit(
    name="Wan2.1-T2V-1.3B",
    coefficients=(-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    threshold=0.08,
    first_steps=5,
)
_WAN = Fit(
    name="Wan2.1-T2V-14B",
    coefficients=(-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    threshold=0.2,
    first_steps=5,
)
# The paper's scripts take the fit of Wan2.1-T2V-14B for Wan from an image and for Wan 2.2 TI2V too. None is known for
# the two experts of Wan 2.2 A14B: they have its architecture, and take it with the thresholds of 2.1.
_WAN_FITS = {
    "wan2.1-t2v": _WAN,
    "wan2.1-i2v": replace(_WAN, threshold=0.3),
    "wan2.2-t2v-a14b": _WAN,
    "wan2.2-i2v-a14b": replace(_WAN, threshold=0.3),
    "wan2.2-ti2v-5b": replace(_WAN, threshold=0.1),
}
_WAN_SMALL_WIDTH = 1536


def _wan_fit(model: nn.Module, pipeline: Any) -> Fit:
    config: Any = model.config
    if config.num_attention_heads * config.attention_head_dim == _WAN_SMALL_WIDTH:
        return _WAN_SMALL
    return _WAN_FITS[ADAPTERS["WanTransformer3DModel"].preset_of(model, pipeline)]


def _cogvideox_fit(model: nn.Module, pipeline: Any) -> Fit:
    config: Any = model.config
    if config.patch_size_t is None:
        raise TypeError(
            "enable_teacache: got CogVideoX 1.0; allowed: CogVideoX 1.5, whose coefficients are known. "
            "transformer.enable_cache(diffusers.FirstBlockCacheConfig()) works without any."
        )
    return _COGVIDEOX_I2V if config.in_channels > config.out_channels else _COGVIDEOX_T2V


CACHED_MODELS: dict[str, CachedModel] = {
    "HunyuanVideoTransformer3DModel": CachedModel(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        signal=_modulated_input,
        fit=lambda model, pipeline: _HUNYUAN,
    ),
    "WanTransformer3DModel": CachedModel(blocks=("blocks",), signal=_time_embedding, fit=_wan_fit),
    "CogVideoXTransformer3DModel": CachedModel(
        blocks=("transformer_blocks",), signal=_time_embedding, fit=_cogvideox_fit
    ),
    "FluxTransformer2DModel": CachedModel(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        signal=_modulated_input,
        fit=lambda model, pipeline: _FLUX,
    ),
}


def cached_model_for(model: nn.Module) -> CachedModel:
    """The row for a transformer of a known class of diffusers, or of a subclass of one.

    Raises TypeError naming the supported classes where there is none.
    """
    for kind in type(model).__mro__:
        if kind is getattr(diffusers, kind.__name__, None):
            if kind.__name__ in CACHED_MODELS:
                return CACHED_MODELS[kind.__name__]
            break
    raise TypeError(
        f"enable_teacache: got a {type(model).__module__}.{type(model).__name__}; allowed: a diffusers pipeline with, "
        f"or itself, one of {list(CACHED_MODELS)}. "
        "transformer.enable_cache(diffusers.FirstBlockCacheConfig()) works for more."
    )
