"""The JSON beside a video: everything needed to make it again, and what it cost."""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..benchmark.record import machine
from ..diagnosis import facts
from ..evaluation.record import environment
from .load import Source
from .request import Request
from .run import Enabled, Generated

_NOT_A_SETTING = ("output_type", "return_dict", "callback_on_step_end_tensor_inputs")


def describe(
    request: Request,
    source: Source,
    pipe: Any,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What does not change while it runs. arguments: of the pipeline's call, with a path for the image."""
    found = facts(device)
    made_on = environment(device)
    return plain(
        {
            "command": request.command_line(revision=source.revision),
            "created": made_on["created"],
            "commit": machine(device, "").commit or None,
            "versions": {"python": found.python, **found.versions},
            "device": {
                **made_on["device"],
                "compute_capability": found.compute_capability,
                "memory_bytes": found.memory,
                "driver": found.driver,
                "cuda": found.cuda,
            },
            "model": {
                "name": source.model,
                "revision": source.revision,
                "folder": None if source.revision else source.folder,
                "pipeline": source.pipeline.__name__,
                "transformers": source.transformers,
            },
            "request": dataclasses.asdict(request),
            "call": call_defaults(source.pipeline) | dict(arguments),
            "image_sha256": None if request.image is None else file_hash(request.image),
            "dtypes": {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)},
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)},
        }
    )


def result(made: Generated, file: Path, fps: int | None) -> dict[str, Any]:
    """One generation: its file, the seconds and the density of every step, and the peak of the GPU's memory."""
    frames, _, height, width = made.clip.video.shape
    return plain(
        {
            "file": file.name,
            "frames": frames,
            "height": height,
            "width": width,
            "fps": fps,
            "seconds": made.clip.seconds,
            "steps": [
                {"seconds": seconds, "density": density}
                for seconds, density in zip(made.clip.steps, made.densities, strict=True)
            ],
            "peak_memory_bytes": made.peak_memory,
        }
    )


def sparse_result(enabled: Enabled) -> dict[str, Any]:
    """What ran sparse, with which settings, and what TeaCache skipped."""
    cached = enabled.teacache
    return plain(
        {
            "configs": {name: config.to_dict() for name, config in enabled.handle.configs().items()},
            "stats": dataclasses.asdict(enabled.handle.stats()),
            "teacache": None if cached is None else cached.stats(),
            "summary": [each.summary() for each in (enabled.handle, cached) if each is not None],
        }
    )


def call_defaults(pipeline: type[Any]) -> dict[str, Any]:
    """The defaults of a pipeline's call that are not None: what it does where nothing is said."""
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    return {
        each.name: each.default
        for each in parameters
        if each.default not in (None, inspect.Parameter.empty) and each.name not in _NOT_A_SETTING
    }


def file_hash(path: str) -> str | None:
    """SHA-256 of a file, None for an address on a network."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def plain(value: Any) -> Any:
    """As JSON has it: NaN and infinity become null, tuples lists, dataclasses mappings, everything else its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return str(value).removeprefix("torch.")
