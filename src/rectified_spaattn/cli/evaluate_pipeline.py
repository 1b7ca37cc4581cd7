"""The pipeline that is evaluated: the demo model, or any text-to-video pipeline of diffusers."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import SparseConfig
from ..evaluation.paired import Settings
from ..generation.load import dtype_of, find, load, place
from ..generation.request import Request
from ..pipelines.adapters import default_configs

DEMO = "demo"
# names in Settings -> options
_OPTIONS = {
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "steps": "steps",
    "guidance_scale": "guidance",
}
# names in Settings -> arguments of a pipeline's call
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
    described = json.loads(index.read_text()) if index.is_file() else {}
    return model == DEMO or described.get("_class_name") == "DemoVideoPipeline"


def load_pipeline(model: str, device: torch.device, dtype: str = "auto", offload: str = "none") -> Any:
    """model: "demo", a folder, or the name of a repository. dtype, offload: as `rectified-spaattn generate` has them;
    "auto" is float32 for the demo model.

    Raises RuntimeError, saying what to do, where there is no such pipeline, it cannot be loaded, or memory is short.
    """
    if is_demo(model):
        from ..demo.pipeline import WEIGHTS, load_demo_pipeline

        exact = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return load_demo_pipeline(device, exact, WEIGHTS if model == DEMO else model)
    request = Request(model=model, prompt="", dtype=dtype, offload=offload)
    pipe = load(find(request), request, dtype_of(request, device))
    place(pipe, device, offload)
    return pipe


def given_settings(options: Any) -> dict[str, Any]:
    """What a command's options say about the pipeline's call, by their names in Settings; None where they do not."""
    return {name: getattr(options, option) for name, option in _OPTIONS.items()}


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


def base_configs(pipe: Any, sparsity: Sequence[float] = ()) -> tuple[SparseConfig, ...]:
    """What configurations start from: exact sparsity on the demo model's small grid, else the model's preset.

    sparsity: what was asked for. Raises ValueError where it is empty and there is no preset for the model.
    """
    if is_demo_pipeline(pipe):
        return (SparseConfig(block_size=64, top_p=0.0, neighbours=False),)
    return default_configs(pipe.transformer, pipe, {"sparsity": sparsity} if sparsity else {})


def is_demo_pipeline(pipe: Any) -> bool:
    return type(pipe).__name__ == "DemoVideoPipeline"
