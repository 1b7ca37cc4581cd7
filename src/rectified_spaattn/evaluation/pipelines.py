"""The pipeline that is evaluated: the demo model, or any text-to-video pipeline of diffusers."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import SparseConfig, preset
from .paired import Settings

DEMO = "demo"
# names here -> arguments of a pipeline's call
_CALL = {
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}


def is_demo(model: str) -> bool:
    """Whether `model` is the packaged demo model or a folder with weights for it."""
    index = Path(model) / "model_index.json"
    return model == DEMO or (index.is_file() and json.loads(index.read_text())["_class_name"] == "DemoVideoPipeline")


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype, offload: bool = False) -> Any:
    """model: "demo", a folder, or the name of a repository. offload: keep models on the CPU while they do not run.

    Raises RuntimeError, saying what to give, where there is no such pipeline.
    """
    if is_demo(model):
        from ..demo.pipeline import WEIGHTS, load_demo_pipeline

        return load_demo_pipeline(device, dtype, WEIGHTS if model == DEMO else model)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"model: cannot load {model!r}; allowed: {DEMO}, a folder that save_pretrained wrote, or the name of a "
            f"repository that can be reached. diffusers says: {error}"
        ) from error
    if not offload:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def call_settings(pipe: Any, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Settings:
    """What the pipeline is called with: `given` where not None, else the pipeline's own defaults.

    arguments: further arguments of the call. Raises TypeError for a pipeline that makes no videos from text or does not
    know an argument, ValueError for a value that is neither given nor has a default.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = {"prompt", "generator", "output_type", "callback_on_step_end", *_CALL.values()}
    lacking = sorted(wanted - set(known))
    if lacking:
        raise TypeError(
            f"model: got a {type(pipe).__name__}, whose call lacks {lacking}; allowed: text-to-video pipelines."
        )
    reserved = sorted(set(arguments) & wanted)
    unknown = sorted(set(arguments) - set(known))
    if reserved or unknown:
        raise TypeError(
            f"arguments: got {reserved + unknown}; allowed: arguments of {type(pipe).__name__}'s call that no option "
            "of this command sets."
        )
    values = {name: known[argument].default if given[name] is None else given[name] for name, argument in _CALL.items()}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: got none, and {type(pipe).__name__} has no default; allowed: a number. Give it.")
    return Settings(**values, arguments=dict(arguments))


def base_configs(pipe: Any) -> tuple[SparseConfig, ...]:
    """What configurations start from: exact sparsity on the demo model's small grid, else the model's preset."""
    if is_demo_pipeline(pipe):
        return (SparseConfig(block_size=64, top_p=0.0, neighbours=False),)
    from ..integrations.diffusers.adapters import adapter_for

    name = adapter_for(pipe.transformer).preset(pipe.transformer, pipe)
    if name is None:
        raise ValueError(
            f"{type(pipe).__name__}: got no configuration, and there is no published preset for this model; allowed: "
            "one or more YAML files of a SparseConfig. Give --config."
        )
    return preset(name)


def is_demo_pipeline(pipe: Any) -> bool:
    return type(pipe).__name__ == "DemoVideoPipeline"
