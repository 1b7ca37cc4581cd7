"""enable: put rectified attention into a diffusers pipeline, one processor at a time."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..backends import BACKENDS
from ..config import SparseConfig
from ..config import preset as preset_of
from .adapters import Adapter, adapter_for, default_configs
from .handle import Enabled, Handle
from .processor import check_processor, dense_backend, wrap
from .state import LayerState, RunClock, TransformerState
from .watch import Watch


def enable(
    pipe_or_transformer: Any,
    config: SparseConfig | Sequence[SparseConfig] | None = None,
    *,
    preset: str | None = None,
    backend: str = "auto",
    **overrides: Any,
) -> Handle:
    """Make the video self-attention of a diffusers pipeline (or of one transformer) sparse and rectified.

    config: one SparseConfig for all transformers of the pipeline, or one each; None takes the preset that fits the
    model, and where there is none, asks for a sparsity. preset: a name from PRESETS instead, such as NAME-paper for all
    as published. backend: as in rectified_attention. overrides: fields of SparseConfig that change the config or
    preset, such as sparsity=0.9.

    Touches the given object alone; Handle.disable() restores it. Cross-attention and text refiners stay as they are.
    Raises TypeError for a model without an adapter, an unknown key or a config of the wrong type; ValueError for values
    out of range or config together with preset; RuntimeError where it is enabled already.
    """
    transformers, pipeline = transformers_of(pipe_or_transformer)
    adapters = [adapter_for(model) for _, model in transformers]
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: one of {['auto', *BACKENDS]}.")
    if config is None:
        chosen = preset_of(preset) if preset is not None else default_configs(transformers[0][1], pipeline, overrides)
    elif preset is not None:
        raise ValueError(f"enable: got both config and preset={preset!r}; allowed: one of them.")
    else:
        chosen = (config,) if isinstance(config, SparseConfig) else _checked(config)
    if len(chosen) == 1:
        chosen = chosen * len(transformers)
    if len(chosen) != len(transformers):
        raise ValueError(
            f"enable: got {len(chosen)} configs for {len(transformers)} transformer(s) "
            f"({', '.join(name for name, _ in transformers)}); allowed: one for all, or one each."
        )
    chosen = tuple(each.replace(**overrides) for each in chosen)

    _check_models(transformers, adapters, chosen)
    clock, watch = RunClock(pipeline), Watch()
    enabled = [
        _enable_one(name, model, adapter, each, backend, clock, watch)
        for (name, model), adapter, each in zip(transformers, adapters, chosen, strict=True)
    ]
    warm_up = [each.dense_steps for each in chosen if each.dense_steps]
    if warm_up and not clock.tells_steps():
        watch.said.add("step")
        warnings.warn(
            f"rectified_spaattn: dense_steps={warm_up[0]} needs the denoising step, which "
            "only a pipeline tells, by its scheduler's step_index or its own current_timestep: until "
            "handle.set_step(step, total) is called every step is sparse. Or pass dense_steps=0.",
            stacklevel=2,
        )
    return Handle(enabled, clock)


def transformers_of(target: Any) -> tuple[list[tuple[str, nn.Module]], Any | None]:
    """The named transformers of a pipeline, and the pipeline; for a transformer itself None in its place."""
    if isinstance(target, nn.Module):
        return [("transformer", _uncompiled(target))], None
    names = [name for name in ("transformer", "transformer_2") if isinstance(getattr(target, name, None), nn.Module)]
    if not names:
        raise TypeError(
            f"enable: got a {type(target).__name__} without a transformer; allowed: a diffusers pipeline that has one, "
            "or the transformer itself."
        )
    return [(name, _uncompiled(getattr(target, name))) for name in names], target


def _uncompiled(model: nn.Module) -> nn.Module:
    """The transformer itself where torch.compile(transformer) put a module around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _checked(configs: Sequence[SparseConfig]) -> tuple[SparseConfig, ...]:
    if not isinstance(configs, tuple | list) or not all(isinstance(each, SparseConfig) for each in configs):
        raise TypeError(
            f"config: got {configs!r}; allowed: a SparseConfig, or a list of one a transformer. "
            "From a dict: SparseConfig.from_dict(...)."
        )
    return tuple(configs)


def _check_models(
    transformers: list[tuple[str, nn.Module]], adapters: list[Adapter], configs: tuple[SparseConfig, ...]
) -> None:
    """Everything that can be wrong with a model is found before any is touched."""
    for (name, model), adapter, config in zip(transformers, adapters, configs, strict=True):
        attentions: list[tuple[str, Any]] = adapter.attentions(model)
        if any(hasattr(module.processor, "rectified_layer") for _, module in attentions):
            raise RuntimeError(f"{name} is enabled already: call disable() of the handle you have, then enable again.")
        for layer_name, module in attentions:
            check_processor(module.processor, f"{name}.{layer_name}")
        beyond = [index for index in config.dense_layers if index >= len(attentions)]
        if beyond:
            raise ValueError(f"dense_layers: got {beyond}; allowed: 0 to {len(attentions) - 1}, the layers of {name}.")


def _enable_one(
    name: str,
    model: nn.Module,
    adapter: Adapter,
    config: SparseConfig,
    backend: str,
    clock: RunClock,
    watch: Watch,
) -> Enabled:
    attentions: list[tuple[str, Any]] = adapter.attentions(model)
    state = TransformerState(config=config, backend=backend, clock=clock, text_first=adapter.text_first)
    watch.states[name] = state
    originals = [(module, module.processor) for _, module in attentions]
    for index, (layer_name, module) in enumerate(attentions):
        layer = LayerState(
            index=index,
            name=f"{name}.{layer_name}",
            owner=state,
            dense_backend=dense_backend(module.processor),
        )
        state.layers.append(layer)
        module.set_processor(wrap(module.processor, layer))

    hook = model.register_forward_pre_hook(_watcher(name, adapter, watch, originals), with_kwargs=True)
    return Enabled(name=name, model=model, state=state, hook=hook, originals=originals)


def _watcher(
    name: str, adapter: Adapter, watch: Watch, originals: list[tuple[Any, Any]]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook: tells the state what is coming, and warns of what does not go as configured."""

    @torch.compiler.disable  # bookkeeping of each call: not to be traced where the whole transformer is compiled
    def before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        text, padding = adapter.text(inputs), adapter.padding(inputs)
        watch.states[name].begin_forward(
            adapter.grid(model, inputs), text=text, padding=padding, timestep=inputs.get("timestep")
        )
        for complaint in watch.complaints(name, model, originals):
            warnings.warn(f"rectified_spaattn: {complaint}", stacklevel=2)

    return before_forward
