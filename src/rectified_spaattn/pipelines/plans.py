"""Where diffusers cuts the sequence of a model over several processes, and joins it again: one plan a model class.

For the classes that diffusers has no plan for, or one that fails in use: LTX-Video's does with a text mask, which its
pipelines always pass, and for LTX-2's keys of the video are missing where audio attends to it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from ..layout import TokenLayout
from .adapters import ADAPTERS, Adapter
from .ranks import context_parallel, streams_of

Plan = dict[str, Any]


def _cut(dim: int, dims: int, *, output: bool = False) -> Any:
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=output)


def _cut_outputs(dim: int, dims: int) -> Plan:
    """Of a module that gives two tensors, cosines and sines."""
    return {0: _cut(dim, dims, output=True), 1: _cut(dim, dims, output=True)}  # type: ignore[dict-item]


def _joined(dim: int = 1, dims: int = 3) -> Any:
    return ContextParallelOutput(gather_dim=dim, expected_dims=dims)


_VIDEO = {"hidden_states": _cut(1, 3)}
_BOTH = {"hidden_states": _cut(1, 3), "encoder_hidden_states": _cut(1, 3)}


_LTX = {"": {"timestep": _cut(1, 2)}, "rope": _cut_outputs(1, 3), "transformer_blocks.0": _VIDEO, "proj_out": _joined()}
_HUNYUAN_VIDEO = {"rope": _cut_outputs(0, 2), "transformer_blocks.0": _BOTH, "proj_out": _joined()}


def _ltx2(model: nn.Module) -> Plan:
    config: Any = model.config
    dim, dims = (2, 4) if config.rope_type == "split" else (1, 3)
    to_audio = "transformer_blocks.*.video_to_audio_attn"
    return {
        **_LTX,
        "rope": _cut_outputs(dim, dims),
        "transformer_blocks.*.audio_to_video_attn": {"query_rotary_emb": [_cut(dim, dims), _cut(dim, dims)]},
        f"{to_audio}.to_k": _joined(),
        f"{to_audio}.to_v": _joined(),
    }


PLANS: Mapping[str, Plan | Callable[[nn.Module], Plan]] = {
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO,
    "WanVACETransformer3DModel": {
        "rope": _cut_outputs(1, 4),
        "vace_blocks.0": {**_VIDEO, "control_hidden_states": _cut(1, 3)},
        "blocks.0": _VIDEO,
        "proj_out": _joined(),
    },
    "WanAnimateTransformer3DModel": {
        "rope": _cut_outputs(1, 4),
        "blocks.0": _VIDEO,
        # the tokens of a frame attend to its face: on the whole video, since a part of it holds no whole frames
        "face_adapter.*.pre_norm_q": _joined(),
        "face_adapter.*": {0: _cut(1, 3, output=True)},
        "proj_out": _joined(),
    },
    "SkyReelsV2Transformer3DModel": {
        "rope": _cut_outputs(1, 4),
        "blocks.0": _VIDEO,
        # with a timestep a frame, every token has a modulation, and the last one is added to the whole video
        "blocks.*": {"temb": _cut(2, 4)},
        "norm_out": _joined(),
    },
    "CogVideoXTransformer3DModel": {
        "": {"image_rotary_emb": [_cut(0, 2), _cut(0, 2)]},
        "transformer_blocks.0": _BOTH,
        "proj_out": _joined(),
    },
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _ltx2,
}


def _own_plan(model: nn.Module) -> Plan | None:
    plan = next((PLANS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in PLANS), None)
    return plan(model) if callable(plan) else plan


def cp_plan(model: nn.Module) -> Plan | None:
    """The plan for a transformer: ours, or else that of its class in diffusers; None where there is neither."""
    return _own_plan(model) or getattr(model, "_cp_plan", None)


def has_own_plan(model: nn.Module) -> bool:
    """Whether the plan for a transformer is one of ours."""
    return _own_plan(model) is not None


def why_not_cut(model: Any, adapter: Adapter, ranks: int) -> str | None:
    """Why a model cannot be cut over so many processes, and what to do; None where it can."""
    if cp_plan(model) is None:
        known = sorted(
            name for name in ADAPTERS if name in PLANS or getattr(getattr(diffusers, name), "_cp_plan", None)
        )
        return f"nobody has a plan of where to cut a {type(model).__name__}; allowed: {known}."
    heads = heads_of(model, adapter)
    if heads % ranks:
        divisors = [n for n in range(2, heads + 1) if heads % n == 0]
        return f"got {heads} heads for {ranks} processes; allowed: as many heads for each. Start {divisors} processes."
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return (
            "got image_condition_type='token_replace', whose first-frame modulation every process would apply to the "
            "first tokens of its own part. Run it in one process."
        )
    if type(getattr(model, "_cache_config", None)).__name__ == "FirstBlockCacheConfig":
        return (
            "got FirstBlockCache, by which every process would decide from its own tokens whether the blocks run, and "
            "wait for ones that do not. Use rsa.enable_teacache, which decides for all, or disable_cache()."
        )
    return None


def check_cut(model: Any, adapter: Adapter, layouts: Sequence[TokenLayout], name: str) -> None:
    """At the beginning of a forward, on every rank alike. Raises RuntimeError, saying what to do.

    layouts: of its calls, on all ranks together.
    """
    config = context_parallel(model)
    if config is None:
        return
    if config.ring_degree > 1:
        raise RuntimeError(
            f"{name}: got ring_degree={config.ring_degree}; allowed: 1. Blocks are chosen among all keys, and in a "
            "ring no process ever has them. Use ContextParallelConfig(ulysses_degree=...)."
        )
    count = config.ulysses_degree
    reason = why_not_cut(model, adapter, count)
    if reason is None and not adapter.packed and any(len(layout.spans) != 1 for layout in layouts):
        reason = (
            f"got {layouts[0]} with tokens to tile in several places, which nobody says how to cut over processes. Run "
            "it in one process."
        )
    if reason is not None:
        raise RuntimeError(f"{name}: {reason}")
    lengths = [length for layout in layouts for length in streams_of(layout, adapter.packed)]
    if not config.ulysses_anything and any(length % count for length in lengths):
        reason = (
            f"got {' and '.join(map(str, lengths))} tokens for {count} processes; allowed: multiples of {count}. "
            "Change the size or the text length, or pass uneven=True to parallelize (ulysses_anything=True to "
            "ContextParallelConfig)."
        )
    if reason is not None:
        raise RuntimeError(f"{name}: {reason}")


def heads_of(model: Any, adapter: Adapter) -> int:
    """The number of heads of a transformer, the same in all its layers."""
    modules: list[Any] = [module for _, module in adapter.attentions(model)]
    return int(modules[0].heads)
