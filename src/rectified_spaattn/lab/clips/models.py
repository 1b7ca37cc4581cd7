"""From a repository or folder to a pipeline on its device: found, checked, loaded, placed."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..pipelines.adapters import ADAPTERS
from .request import GenerationError, Request

_INDEX = "model_index.json"
_OPTIONS = {  # argument of the pipeline's call -> field of the request
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "image",
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
_NEEDS_FTFY = ("Wan", "SkyReels")
_NEEDED = ("prompt", "generator", "output_type", "callback_on_step_end")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is, and what.

    revision    the commit of its repository, None for a folder
    pipeline    the class that runs it
    components  name -> class, of those that are there
    """

    model: str
    folder: Path
    revision: str | None
    pipeline: type[Any]
    components: dict[str, str]

    @property
    def transformers(self) -> dict[str, str]:
        """Name -> class."""
        return {name: self.components[name] for name in ("transformer", "transformer_2") if name in self.components}

    @property
    def makes_video(self) -> bool:
        return "num_frames" in _parameters(self.pipeline)


def find(request: Request) -> Source:
    """What the model is, from its model_index.json alone: no weights are downloaded or loaded.

    HF_HUB_OFFLINE and HF_HOME mean what they mean to huggingface_hub. Raises GenerationError where the model cannot be
    had, has no supported transformer, or does not fit the request.
    """
    if find_spec("transformers") is None:
        raise GenerationError('Text encoders need transformers: pip install "rectified-spaattn[generate]"')
    index, revision = _index(request)
    if not index.is_file():
        raise GenerationError(
            f"{request.model}: got a folder without {_INDEX}; allowed: a diffusers pipeline, as "
            "save_pretrained writes it. Single-file checkpoints and transformers alone have to be converted first."
        )
    described = json.loads(index.read_text())
    source = Source(
        model=request.model,
        folder=index.parent,
        revision=revision,
        pipeline=_pipeline_class(described, request),
        components={name: part[1] for name, part in described.items() if isinstance(part, list) and part[1]},
    )
    unsupported = [name for name in source.transformers.values() if name not in ADAPTERS]
    if unsupported or not source.transformers:
        got = ", ".join(unsupported) or f"a {source.pipeline.__name__} without a transformer"
        raise GenerationError(f"{request.model}: got {got}; allowed: a pipeline with one of {list(ADAPTERS)}.")
    call_arguments(source, request)
    return source


def call_arguments(source: Source, request: Request) -> dict[str, Any]:
    """What the request says to the pipeline's call, the image still a path.

    Raises GenerationError for what the pipeline does not take, or needs and does not get.
    """
    taken = _parameters(source.pipeline)
    lacking = [name for name in _NEEDED if name not in taken]
    if lacking:
        raise GenerationError(f"{source.pipeline.__name__} takes no {', '.join(lacking)}: it cannot be run here.")
    given = {name: getattr(request, field) for name, field in _OPTIONS.items()}
    arguments = {name: value for name, value in given.items() if value is not None} | request.arguments()
    unknown = [name for name in arguments if name not in taken]
    if unknown:
        told = ", ".join(f"--{_OPTIONS[name]}" if name in _OPTIONS else f"--argument {name}" for name in unknown)
        raise GenerationError(f"{source.pipeline.__name__} takes no {told}; it takes {', '.join(taken)}. Leave it out.")
    if "image" in taken and taken["image"].default is inspect.Parameter.empty and "image" not in arguments:
        raise GenerationError(f"{source.pipeline.__name__} starts from an image. Give one: --image FILE.")
    return arguments


def dtype_of(request: Request, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if request.dtype != "auto":
        return getattr(torch, request.dtype)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load(source: Source, request: Request, dtype: torch.dtype) -> Any:
    """The pipeline on the CPU, its VAE tiled, without a progress bar of its own; downloaded where it is not there yet.

    Wan's VAE and image encoder stay in float32, as diffusers' documentation has them. Raises GenerationError where
    weights or packages are missing.
    """
    name = source.pipeline.__name__
    if name.startswith(_NEEDS_FTFY) and name != "WanPipeline" and find_spec("ftfy") is None:
        raise GenerationError(f'{name} needs ftfy, which is not installed: pip install "rectified-spaattn[generate]"')
    folder = source.folder
    if source.revision is not None:
        folder = _from_hub(request, partial(source.pipeline.download, source.model, revision=source.revision))
    wanted: Any = dtype
    if name.startswith("Wan"):
        exact = [name for name in ("vae", "image_encoder") if name in source.components]
        wanted = {"default": dtype, **dict.fromkeys(exact, torch.float32)}
    try:
        pipe = source.pipeline.from_pretrained(folder, dtype=wanted)
    except (OSError, ValueError, ImportError) as error:
        raise GenerationError(
            f"{request.model}: the pipeline in {folder} could not be loaded: {error}\n"
            "Check that all of its files and packages are there: download it again, or install what is named above."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if hasattr(getattr(pipe, "vae", None), "enable_tiling"):
        pipe.vae.enable_tiling()
    changes = request.scheduler_changes()
    if changes:
        unknown = [key for key in changes if key not in pipe.scheduler.config]
        if unknown:
            allowed = [key for key in pipe.scheduler.config if not key.startswith("_")]
            raise GenerationError(f"--scheduler: got {', '.join(unknown)}; allowed: {', '.join(allowed)}.")
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Moves the pipeline to the device, whole ("none"), component by component or layer by layer as it runs.

    Raises GenerationError where the weights alone need more memory than is free.
    """
    if device.type == "cpu":
        if offload != "none":
            raise GenerationError(f"--offload {offload}: there is no GPU to offload from. Leave it out.")
        return
    sizes = {name: weight_bytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    free = torch.cuda.mem_get_info(device)[0]
    check_memory(sizes, free, offload)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)


def check_memory(sizes: dict[str, int], free: int, offload: str) -> None:
    """sizes: bytes of every component. Raises GenerationError where what must be there at once exceeds `free`."""
    largest = max(sizes, key=lambda name: sizes[name])
    needed = {"none": sum(sizes.values()), "model": sizes[largest], "group": 0}[offload]
    if needed <= free:
        return
    what = "all weights" if offload == "none" else f"the largest component, {largest},"
    if offload == "none" and sizes[largest] <= free:
        todo = "--offload model keeps one component at a time on the GPU (slower); --offload group needs least"
    else:
        todo = "--offload group keeps a few layers at a time on the GPU (slower)"
    raise GenerationError(
        f"Not enough GPU memory: {what} take {_gib(needed)}, {_gib(free)} are free, and activations come on top. "
        f"{todo}."
    )


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))


def _index(request: Request) -> tuple[Path, str | None]:
    """The path of model_index.json, and the commit it is from; None for a folder."""
    local = Path(request.model).expanduser()
    if local.is_dir():
        if request.revision is not None:
            raise GenerationError(f"--revision: got one for the folder {local}; allowed: for a repository alone.")
        return local.resolve() / _INDEX, None
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", request.model):
        raise GenerationError(
            f"{request.model}: there is no such folder, and it is no name of a repository, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    from huggingface_hub import hf_hub_download

    path = Path(_from_hub(request, partial(hf_hub_download, request.model, _INDEX, revision=request.revision)))
    return path, path.parent.name


def _from_hub(request: Request, get: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return get()
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise GenerationError(_why_not_from_hub(request, error)) from error


def _why_not_from_hub(request: Request, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{request.model}"
    if isinstance(error, GatedRepoError):
        return f"{request.model} is gated: accept its terms at {page}, then run `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{request.model} has no revision {request.revision}: see {page}/commits."
    if isinstance(error, RepositoryNotFoundError):
        return f"{request.model}: no such repository, or a private one. Check {page}, or run `hf auth login`."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{request.model}: got a repository without {_INDEX}; allowed: a diffusers pipeline ({page}/tree/main)."
    told = "and the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else f"and: {error}"
    return (
        f"{request.model} is not in the local cache, {told}.\n"
        f"Connect to a network (and unset HF_HUB_OFFLINE), or run `hf download {request.model}` elsewhere and pass "
        "the folder instead."
    )


def _pipeline_class(described: dict[str, Any], request: Request) -> type[Any]:
    import diffusers

    name = described.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise GenerationError(
            f"{request.model}: got the pipeline {name!r}; allowed: a class of the installed diffusers."
        )
    found = getattr(diffusers, name)
    if request.image is None or "image" in _parameters(found):
        return found
    if name == "WanPipeline" and described.get("expand_timesteps"):  # Wan2.2 TI2V: one set of weights for both
        return diffusers.WanImageToVideoPipeline
    raise GenerationError(f"--image: {name} starts from a text alone. Use an image-to-video model, or leave it out.")


def _parameters(pipeline: type[Any]) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in inspect.signature(pipeline.__call__).parameters.items() if name != "self"}


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
