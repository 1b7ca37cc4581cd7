"""Transformers with random weights, made where they are to run, and copies that share them and attend as told."""

import copy
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from ...config import SparseConfig
from .architecture import Grid, Model
from .baselines import BASELINES
from .shapes import Variant


def build(model: Model, units: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The first `units` units of the model. No weight ever exists in another place or in a wider dtype.

    Matrices are normal with standard deviation 1 / sqrt(inputs), biases zero, norms one. What diffusers keeps in
    float32 when it loads the model in half precision is float32 here, too.
    """
    import diffusers

    with torch.device(device), ExitStack() as after:  # the default dtype is what diffusers loads a model by
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        transformer: Any = getattr(diffusers, model.transformer)(**model.arguments(units))
    kept = transformer._keep_in_fp32_modules or ()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return transformer.eval().requires_grad_(False)


def shallow_copy(transformer: nn.Module, model: Model, units: int) -> Any:
    """The first `units` units as a model of their own, with processors of its own, on the same weights."""
    shared = {id(tensor): tensor for tensor in chain(transformer.parameters(), transformer.buffers())}
    twin: Any = copy.deepcopy(transformer, shared)
    for name, count in zip(_block_lists(twin), model.unit.values(), strict=True):
        setattr(twin, name, getattr(twin, name)[: units * count])
    return twin


def weight_bytes(transformer: nn.Module, model: Model, units: int) -> int:
    """Of the whole model, scaled from the first unit and the first `units`, 2 or more."""
    few, more = (
        sum(parameter.nbytes for parameter in shallow_copy(transformer, model, count).parameters())
        for count in (1, units)
    )
    return few + (more - few) * (model.units - 1) // (units - 1)


def _block_lists(transformer: nn.Module) -> list[str]:
    """Where a transformer keeps its layers, in the order of `unit`."""
    from ...pipelines.adapters import adapter_for

    attentions = adapter_for(transformer).attentions(transformer)
    return list(dict.fromkeys(name.partition(".")[0] for name, _ in attentions))


def enable(transformer: Any, variant: Variant, config: SparseConfig) -> Any:
    """Enables rectified attention on a transformer; a variant that is not sparse puts its attention in its place.

    All go through the same seam, so nothing else differs. Dense ones leave the text mask out: every text token is valid
    here, and without a mask dense attention is fastest. Returns the Handle.
    """
    from ...pipelines import enable as enable_attention

    config = config.replace(sparsity=variant.sparsity or 0.0)
    handle = enable_attention(transformer, config, backend=variant.name if variant.kind == "sparse" else "auto")
    if variant.kind != "sparse":
        run = BASELINES[variant.name].run if variant.kind == "dense" else _copy_v
        for processor in transformer.attn_processors.values():
            layer = getattr(processor, "rectified_layer", None)
            if layer is not None:
                layer.attend = lambda q, k, v, *mask_and_scale: run(q, k, v)
                layer.called = True  # or a warning would say that it calls no attention
    return handle


def _copy_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)  # a copy


def compile_blocks(transformer: Any, compiler: str) -> None:
    """compile_repeated_blocks(fullgraph=True); for CogVideoX, which diffusers names no repeated blocks of, by hand."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(fullgraph=True, backend=compiler)
        return
    for name in _block_lists(transformer):
        for block in getattr(transformer, name):
            block.compile(fullgraph=True, backend=compiler)


def inputs_for(model: Model, grid: Grid, device: torch.device, dtype: torch.dtype, seed: int = 1) -> dict[str, Any]:
    """Arguments of a forward: normal numbers; every text token is valid."""
    generator = torch.Generator(device).manual_seed(seed)
    make = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return model.inputs(model, grid, make)


def exact(transformer: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of an untouched model in float32, from the same weights and inputs."""
    return output(copy.deepcopy(transformer).float(), {name: _widened(value) for name, value in inputs.items()})


def _widened(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_widened(each) for each in value)
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def output(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """One forward; of what is made, the video."""
    video = transformer(**inputs, return_dict=False)[0]
    return video[0] if isinstance(video, list) else video  # one a sample
