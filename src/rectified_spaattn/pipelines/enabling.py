"""enable and disable: rectified attention on a diffusers pipeline, one processor at a time."""

import logging
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..backends import check_backend
from ..config import SparseConfig
from .adapters import Adapter, adapter_for, checkpoint, default_configs
from .attachment import Attachment, ForwardHooks, RunHook, attach
from .clock import RunClock
from .handle import Handle
from .hooks import living_hooks
from .processor import check_processor, is_enabled
from .state import TransformerState
from .watch import Watch

_log = logging.getLogger(__name__)
EXPERTS = ("transformer", "transformer_2")  # of one model; the others are models of their own
SLOTS = (*EXPERTS, "transformer_ref", "unconditional_transformer")


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
    model. preset: a name from PRESETS instead, such as NAME-paper for all as published. backend: as in
    rectified_attention. overrides: fields of SparseConfig that change the config or preset, such as sparsity=0.9.

    Touches the given object alone; Handle.disable() or disable(pipe) restores it. Cross-attention and text refiners
    stay as they are. Steps are those of the given pipeline's scheduler: enable on the pipeline that you call.
    Raises TypeError for a model without an adapter, an unknown key or a config of the wrong type; ValueError for values
    out of range, config together with preset, or 8 bits with a backend that has none; RuntimeError where it is enabled
    already.
    """
    transformers, pipeline = transformers_of(pipe_or_transformer)
    adapters = [adapter_for(model) for _, model in transformers]
    check_backend(backend)
    if config is not None and preset is not None:
        raise ValueError(f"enable: got both config and preset={preset!r}; allowed: one of them.")
    if config is None:
        chosen = _of_each(default_configs(transformers[0][1], pipeline, preset), transformers, pipeline)
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
    for each in chosen:
        if each.least_precision != "inputs" and backend not in ("auto", "triton"):
            raise ValueError(
                f"enable: got precision={each.precision!r} with backend={backend!r}; allowed with it: 'triton', or "
                "'auto', which takes triton then."
            )

    _check_models(transformers, adapters, chosen)
    clock = RunClock(pipeline)
    watch = Watch(pipeline=None if pipeline is None else weakref.ref(pipeline))
    attachments: list[Attachment] = []
    try:
        for (name, model), adapter, each in zip(transformers, adapters, chosen, strict=True):
            state = TransformerState(
                name=name,
                kind=type(model).__name__,
                model=weakref.ref(model),
                config=each,
                backend=backend,
                clock=clock,
                is_first=not watch.states,
            )
            watch.states.append(state)
            attachments.append(Attachment(state=state))
            _enable_one(model, adapter, attachments[-1], watch)
        for module in _run_first_or_last(pipeline):
            RunHook(attachments, watch).register(module)
        needing = next((each.steps_wanted for each in watch.states if each.needs_steps), None)
        if needing and not clock.tells_steps():
            watch.said.add("step")
            warnings.warn(
                f"rectified_spaattn: {needing} needs the denoising step, which "
                "only a pipeline tells, by its scheduler's step_index or its own current_timestep: until "
                "handle.set_step(step, total) is called every step is sparse. Or pass dense_steps=0.",
                stacklevel=2,
            )
    except BaseException:
        for attachment in attachments:
            attachment.detach()
        raise
    handle = Handle(attachments, clock, watch)
    _log.info("enable: %r", handle)
    return handle


def disable(pipe_or_transformer: Any) -> bool:
    """Take rectified attention off a pipeline or a transformer, also where the handle is lost; TeaCache stays.

    Returns whether any was enabled there.
    """
    parts = getattr(pipe_or_transformer, "__dict__", {}).values()
    modules = [pipe_or_transformer] if isinstance(pipe_or_transformer, nn.Module) else list(parts)
    found = {
        id(attachment): attachment
        for module in modules
        if isinstance(module, nn.Module)
        for hooks in living_hooks(_uncompiled(module))
        for attachment in hooks.attachments
    }
    active = [attachment for attachment in found.values() if attachment.state.active]
    for attachment in found.values():
        attachment.detach()
    return bool(active)


def transformers_of(target: Any) -> tuple[list[tuple[str, nn.Module]], Any | None]:
    """The named transformers of a pipeline, and the pipeline; for a transformer itself None in its place.

    One that stands in two places is named once, by the first.
    """
    if isinstance(target, nn.Module):
        return [("transformer", _uncompiled(target))], None
    names = [name for name in SLOTS if isinstance(getattr(target, name, None), nn.Module)]
    if not names:
        raise TypeError(
            f"enable: got a {type(target).__name__} without a transformer; allowed: a diffusers pipeline that has one, "
            "or the transformer itself."
        )
    models = {name: _uncompiled(getattr(target, name)) for name in names}
    first = {id(model): name for name, model in reversed(models.items())}
    return [(name, model) for name, model in models.items() if first[id(model)] == name], target


def _uncompiled(model: nn.Module) -> nn.Module:
    """The transformer itself where torch.compile(transformer) put a module around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _of_each(
    configs: tuple[SparseConfig, ...], transformers: list[tuple[str, nn.Module]], pipeline: Any
) -> tuple[SparseConfig, ...]:
    """Of a preset for two experts, the config of the one that is there alone."""
    if len(configs) != len(EXPERTS) or len(transformers) != 1:
        return configs
    if configs[0] == configs[1]:
        return configs[:1]
    ((name, model),) = transformers
    if pipeline is None:
        name = checkpoint(model).replace("\\", "/").rpartition("/")[2]
    if name in EXPERTS:
        return (configs[EXPERTS.index(name)],)
    raise ValueError(
        "enable: got a transformer alone and a preset with a config for each of two experts; allowed: the pipeline, or "
        "config=rsa.preset(name)[0] for the expert for high noise and config=rsa.preset(name)[1] for the other."
    )


def _run_first_or_last(pipeline: Any) -> list[nn.Module]:
    """Parts of a pipeline that every run of it calls, whatever transformer it has."""
    parts = {name: part for name, part in getattr(pipeline, "__dict__", {}).items() if isinstance(part, nn.Module)}
    encoders = [part for name, part in parts.items() if "encoder" in name]
    decoder = getattr(parts.get("vae"), "decoder", None)
    return [*encoders, decoder] if isinstance(decoder, nn.Module) else encoders


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
        if living_hooks(model) or any(is_enabled(module) for _, module in attentions):
            raise RuntimeError(
                f"{name} is enabled already: call rsa.disable(pipe), or disable() of the handle you have, then enable "
                "again."
            )
        for layer_name, module in attentions:
            check_processor(module.processor, f"{name}.{layer_name}")
        beyond = [index for index in config.dense_layers if index >= len(attentions)]
        if beyond:
            raise ValueError(f"dense_layers: got {beyond}; allowed: 0 to {len(attentions) - 1}, the layers of {name}.")


def _enable_one(model: nn.Module, adapter: Adapter, attachment: Attachment, watch: Watch) -> None:
    ForwardHooks(attachment, adapter, watch).register(model)
    attach(adapter.attentions(model), attachment.state)
    for layer in attachment.state.layers:  # no reason to warn where it is never called
        layer.called = layer.name.partition(".")[2].startswith(adapter.optional)
