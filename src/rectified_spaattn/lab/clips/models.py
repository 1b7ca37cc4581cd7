"""From a repository or folder to a pipeline on its device: checked, loaded, placed."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines import ADAPTERS
from ...pipelines.enabling import SLOTS
from .hub import from_hub, read_index
from .options import CALL, DEMO, PICTURES, ClipError, ModelOptions

INSTALL = 'pip install ".[generate]" in a checkout of rectified-spaattn'
_DEMO_PIPELINE = "DemoVideoPipeline"
_NEEDS_FTFY = ("Wan", "SkyReels")
_NEEDED = ("prompt", "generator", "output_type")


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
        return {name: self.components[name] for name in SLOTS if name in self.components}

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Of the pipeline's call."""
        signature = inspect.signature(self.pipeline.__call__)
        return {name: each for name, each in signature.parameters.items() if name != "self"}

    @property
    def makes_video(self) -> bool:
        return "num_frames" in self.parameters

    @property
    def is_demo(self) -> bool:
        return self.pipeline.__name__ == _DEMO_PIPELINE


def source_of(options: ModelOptions) -> Source:
    """What the model is, from its model_index.json alone: no weights are downloaded or loaded.

    Raises ClipError where the model cannot be had, has no supported transformer, or does not fit the options.
    """
    if options.model == DEMO:
        source = demo_source()
    else:
        index, folder, revision = read_index(options)
        source = Source(
            model=options.model,
            folder=folder,
            revision=revision,
            pipeline=_pipeline_class(index, options),
            components={
                name: str(part[1]) for name, part in index.items() if isinstance(part, list) and part[1:] and part[1]
            },
        )
    if not source.is_demo and find_spec("transformers") is None:
        raise ClipError(f"Text encoders need transformers: {INSTALL}.")
    unsupported = [name for name in source.transformers.values() if name not in ADAPTERS]
    if unsupported or not source.transformers:
        got = ", ".join(unsupported) or f"a {source.pipeline.__name__} without a transformer"
        raise ClipError(f"{options.model}: got {got}; allowed: a pipeline with one of {list(ADAPTERS)}.")
    call_arguments(source, options)
    return source


def demo_source(folder: Path | None = None) -> Source:
    """The packaged demo model, or the one in a folder."""
    from ..demo_model.pipeline import WEIGHTS, DemoVideoPipeline

    return Source(
        model=DEMO if folder is None else str(folder),
        folder=folder or WEIGHTS,
        revision=None,
        pipeline=DemoVideoPipeline,
        components={"transformer": "HunyuanVideoTransformer3DModel"},
    )


def call_arguments(source: Source, options: ModelOptions) -> dict[str, Any]:
    """What the options say to the pipeline's call, pictures still paths.

    Raises ClipError for what the pipeline does not take, or needs and does not get.
    """
    name, parameters = source.pipeline.__name__, source.parameters
    lacking = [each for each in _NEEDED if each not in parameters]
    if lacking:
        raise ClipError(f"{name} takes no {', '.join(lacking)}: it cannot be run here.")
    asked = {argument: getattr(options, field, None) for field, argument in CALL.items()}
    arguments = {argument: value for argument, value in asked.items() if value is not None} | options.arguments()
    unknown = [each for each in arguments | dict.fromkeys(sorted(options.pictures)) if each not in parameters]
    if unknown:
        fields = {argument: field for field, argument in CALL.items()}
        words = ", ".join(
            f"--{fields[each].replace('_', '-')}" if each in fields else f"--argument {each}" for each in unknown
        )
        raise ClipError(f"{name} takes no {words}; it takes {', '.join(parameters)}. Leave it out.")
    image = parameters.get("image")
    if image is not None and image.default is inspect.Parameter.empty and "image" not in options.pictures:
        raise ClipError(f"{name} starts from an image. Give one: --image FILE.")
    return arguments


def call_defaults(source: Source) -> dict[str, Any]:
    """The defaults of the pipeline's call that are not None: what it does where nothing is said."""
    other = ("output_type", "return_dict", "callback_on_step_end_tensor_inputs")
    return {
        name: each.default
        for name, each in source.parameters.items()
        if each.default not in (None, inspect.Parameter.empty) and name not in other
    }


def with_pictures(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the pictures of the paths in PICTURES. Raises ClipError where one cannot be read."""
    from diffusers.utils import load_image

    read = dict(arguments)
    for name in (each for each in PICTURES if each in arguments):
        path, flag = arguments[name], f"--{name.replace('_', '-')}"
        if not path.startswith(("http://", "https://")) and not Path(path).is_file():
            raise ClipError(f"{flag}: got {path}; allowed: a picture file or an address, and there is no such file.")
        try:
            read[name] = load_image(path)
        except (OSError, ValueError) as error:
            raise ClipError(f"{flag}: got {path}, which cannot be read as a picture: {error}") from error
    return read


def file_hash(path: str | None) -> str | None:
    """SHA-256 of a file, None for an address on a network."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def dtype_of(source: Source, dtype: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is bfloat16 on a GPU, float32 on a CPU and for the demo model."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.float32 if device.type == "cpu" or source.is_demo else torch.bfloat16


def load(source: Source, options: ModelOptions, device: torch.device) -> Any:
    """The pipeline on its device, its VAE tiled, without a progress bar; downloaded where it is not there yet.

    Wan's VAE and image encoder stay in float32, as diffusers' documentation has them. Weights are read from safetensors
    alone, as other files can run code. Raises ClipError where weights, packages or memory are missing.
    """
    pipe = _load(source, options, dtype_of(source, options.dtype, device))
    pipe.set_progress_bar_config(disable=True)
    if hasattr(getattr(pipe, "vae", None), "enable_tiling"):
        pipe.vae.enable_tiling()
    _change_scheduler(pipe, options.scheduler_changes())
    place(pipe, device, options.offload)
    return pipe


def _load(source: Source, options: ModelOptions, dtype: torch.dtype) -> Any:
    from ..demo_model.pipeline import load_demo_pipeline

    name = source.pipeline.__name__
    if name.startswith(_NEEDS_FTFY) and name != "WanPipeline" and find_spec("ftfy") is None:
        raise ClipError(f"{name} needs ftfy, which is not installed: {INSTALL}.")
    folder, safe = source.folder, {"use_safetensors": True}
    if source.revision is not None:
        folder = from_hub(options, partial(source.pipeline.download, source.model, revision=source.revision, **safe))
    dtypes: Any = dtype
    if name.startswith("Wan"):
        exact = [part for part in ("vae", "image_encoder") if part in source.components]
        dtypes = {"default": dtype, **dict.fromkeys(exact, torch.float32)}
    try:
        if source.is_demo:
            return load_demo_pipeline("cpu", dtype, folder)
        return source.pipeline.from_pretrained(folder, dtype=dtypes, **safe)
    except Exception as error:  # files of any kind: what is wrong with them comes as any exception
        raise ClipError(
            f"{source.model}: the pipeline in {folder} could not be loaded: {error or type(error).__name__}\n"
            "Check that all of its files and packages are there, the weights as .safetensors: download it again, or "
            "install what is named above."
        ) from error


def _change_scheduler(pipe: Any, changes: dict[str, Any]) -> None:
    if not changes:
        return
    kind, fields = type(pipe.scheduler), {key: value for key, value in changes.items() if key != "class"}
    if "class" in changes:
        kind = _scheduler_class(changes["class"])
    allowed = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "kwargs")]
    unknown = [key for key in fields if key not in allowed]
    if unknown:
        raise ClipError(f"--scheduler: got {', '.join(unknown)}; allowed: class, {', '.join(allowed)}.")
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **fields)
    except (TypeError, ValueError) as error:
        raise ClipError(f"--scheduler: {error}") from error


def _scheduler_class(name: Any) -> type[Any]:
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ClipError(
            f"--scheduler: got the class {name!r}; allowed: a scheduler of the installed diffusers, such as "
            "FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler."
        )
    return kind


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Moves the pipeline to the device, whole ("none"), component by component or layer by layer as it runs.

    Raises ClipError where the weights alone need more memory than is free.
    """
    if device.type == "cpu":
        if offload != "none":
            raise ClipError(f"--offload {offload}: there is no GPU to offload from. Leave it out.")
        return
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    tensors = {name: (*part.parameters(), *part.buffers()) for name, part in parts.items()}
    sizes = {name: sum(each.numel() * each.element_size() for each in own) for name, own in tensors.items()}
    check_memory(sizes, torch.cuda.mem_get_info(device)[0], offload)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)


def check_memory(sizes: dict[str, int], free: int, offload: str) -> None:
    """sizes: bytes of every component. Raises ClipError where what must be there at once exceeds `free`."""
    largest = max(sizes, key=lambda name: sizes[name])
    needed = {"none": sum(sizes.values()), "model": sizes[largest], "group": 0}[offload]
    if needed <= free:
        return
    what = "all weights" if offload == "none" else f"the largest component, {largest},"
    if offload == "none" and sizes[largest] <= free:
        todo = "--offload model keeps one component at a time on the GPU (slower); --offload group needs least"
    else:
        todo = "--offload group keeps a few layers at a time on the GPU (slower)"
    raise ClipError(
        f"Not enough GPU memory: {what} take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free, and "
        f"activations come on top. {todo}."
    )


def _pipeline_class(index: dict[str, Any], options: ModelOptions) -> type[Any]:
    import diffusers

    name = index.get("_class_name")
    if name == _DEMO_PIPELINE:
        return demo_source().pipeline
    if not isinstance(name, str) or not isinstance(getattr(diffusers, name, None), type):
        raise ClipError(f"{options.model}: got the pipeline {name!r}; allowed: a class of the installed diffusers.")
    pipeline = getattr(diffusers, name)
    if "image" not in options.pictures or "image" in inspect.signature(pipeline.__call__).parameters:
        return pipeline
    if name == "WanPipeline" and index.get("expand_timesteps"):  # Wan2.2 TI2V: one set of weights for both
        return diffusers.WanImageToVideoPipeline
    raise ClipError(f"--image: {name} starts from a text alone. Use an image-to-video model, or leave it out.")
