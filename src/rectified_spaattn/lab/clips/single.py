"""One clip for a user, the files it becomes, and the JSON beside it with everything needed to make it again."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...pipelines.adapters import default_configs
from ..machine import machine
from ..pages.styles import label_of
from .clip import Clip, Mode
from .folder import file_name
from .models import Source, call_defaults, file_hash
from .options import ClipError, GenerateOptions
from .paths import check_writable
from .prompts import read_prompts
from .summary import ModeSummary, after_the_first, measure, summarise


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes. full, side_by_side: with --compare."""

    clip: Path
    json: Path
    full: Path
    side_by_side: Path


def outputs_of(options: GenerateOptions, source: Source) -> Outputs:
    """--out, or its default, and the files beside it, checked for everything that can go wrong with them.

    Raises ClipError for a suffix that does not fit what the model makes, for what cannot be written, and for files that
    are there already unless --overwrite was given.
    """
    suffix = ".mp4" if source.makes_video else ".png"
    out = options.out or Path("generated" + suffix)
    if out.suffix != suffix:
        kind = "videos" if source.makes_video else "pictures"
        raise ClipError(
            f"--out: got {out}; allowed: a name that ends with {suffix}, since {source.pipeline.__name__} makes {kind}."
        )
    outputs = _named(out)
    more = (outputs.full, outputs.side_by_side) if options.compare else stale(outputs)
    written = [outputs.clip, outputs.json, *more]
    try:
        check_writable(out.parent)
        for path in written:
            if path.is_symlink() and not path.exists():
                raise ClipError(f"--out: got {path}, a link to what is not there; allowed: a file. Remove the link.")
            if path.exists() and not path.is_file():
                raise ClipError(f"--out: got {path}, which is a folder; allowed: a name that is free. Use another one.")
    except OSError as error:
        raise ClipError(f"--out: {out} cannot be written: {error}. Use another one.") from error
    there = [str(path) for path in written if path.exists()]
    if there and not options.overwrite:
        raise ClipError(
            f"--out: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there already. Use another name, or "
            "--overwrite."
        )
    return outputs


def still_free(outputs: Outputs, options: GenerateOptions) -> Outputs:
    """The same, or where somebody else made the clip or its JSON while ours ran, such under the next free name."""
    clip = outputs.clip
    if options.overwrite or not (clip.exists() or outputs.json.exists()):
        return outputs
    others = (_named(clip.with_name(f"{clip.stem}-{number}{clip.suffix}")) for number in itertools.count(2))
    return next(each for each in others if not any(path.exists() for path in astuple(each)))


def _named(out: Path) -> Outputs:
    full, both = (out.with_name(f"{out.stem}-{what}{out.suffix}") for what in ("full", "compare"))
    return Outputs(clip=out, json=out.with_suffix(".json"), full=full, side_by_side=both)


def each_prompt(options: GenerateOptions, source: Source) -> list[GenerateOptions]:
    """The same for every prompt of the file, each with a clip of its own in the folder."""
    assert options.out is not None
    assert options.prompts is not None
    suffix, rows = ".mp4" if source.makes_video else ".png", read_prompts(options.prompts)
    if any(rows.values()):
        raise ValueError(
            f"{options.prompts}: got a table with pictures; allowed: prompts alone, and --image for all. Run "
            "`evaluate`, or one command a picture."
        )
    names = {prompt: f"{file_name(prompt)}-{options.seed}{suffix}" for prompt in rows}
    return [replace(options, prompt=each, prompts=None, out=options.out / names[each]) for each in rows]


def is_finished(options: GenerateOptions, source: Source) -> bool | None:
    """Whether an earlier run of the same command came to its end, clip first, JSON last; None: of another command."""
    assert options.out is not None
    record = options.out.with_suffix(".json")
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        if told["command"] != options.command_line(revision=source.revision):
            return None
        return options.out.is_file() and ("compare" in told) == options.compare
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def stale(outputs: Outputs) -> list[Path]:
    """The clips that an earlier run with --compare wrote beside this one, as its JSON says."""
    try:
        compared = json.loads(outputs.json.read_text(encoding="utf-8"))["compare"]
        names = {compared["full"]["file"], compared["side_by_side"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [path for path in (outputs.full, outputs.side_by_side) if path.name in names and path.exists()]


def mode_of(options: GenerateOptions, pipe: Any) -> Mode:
    """The sparse mode asked for. Raises ClipError where no settings fit the model."""
    try:
        configs = options.configs()
        if configs is None:
            overrides = options.overrides()
            base = default_configs(pipe.transformer, pipe, options.preset)
            configs = tuple(config.replace(**overrides) for config in base)
    except (TypeError, ValueError) as error:
        raise ClipError(str(error)) from error
    cached = " + TeaCache" if options.teacache else ""
    return Mode(
        name="sparse",
        label=f"{label_of(configs[0])}{cached}",
        configs=configs,
        teacache=options.teacache,
        threshold=options.teacache_threshold,
    )


def describe(
    options: GenerateOptions, source: Source, pipe: Any, arguments: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """What does not change while it runs. arguments: of the pipeline's call, with a path for the image."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "command": options.command_line(revision=source.revision),
        **machine(device).to_dict(),
        "model": {
            "name": source.model,
            "revision": source.revision,
            "folder": None if source.revision else source.folder,
            "pipeline": source.pipeline.__name__,
            "transformers": source.transformers,
        },
        "request": asdict(options),
        "call": call_defaults(source) | dict(arguments),
        "image_sha256": file_hash(options.image),
        "last_image_sha256": file_hash(options.last_image),
        "dtypes": {name: part.dtype for name, part in parts.items()},
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)},
    }


def result(clip: Clip, file: Path, fps: int | None) -> dict[str, Any]:
    """One generation: its file, the seconds and the density of every step, and the peak of the GPU's memory."""
    frames, _, height, width = clip.video.shape
    steps = zip(clip.steps, clip.densities, strict=True)
    return {
        "file": file.name,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
        "seconds": clip.seconds,
        "steps": [{"seconds": seconds, "density": density} for seconds, density in steps],
        "peak_memory_bytes": clip.peak_memory,
    }


def sparse_result(clip: Clip, transformers: Mapping[str, str]) -> dict[str, Any]:
    """What ran sparse, with which settings, and what TeaCache skipped."""
    configs = clip.mode.configs * (len(transformers) if len(clip.mode.configs) == 1 else 1)
    return {
        "configs": dict(zip(transformers, configs, strict=True)),
        "stats": clip.stats,
        "teacache": clip.teacache,
        "summary": clip.summary,
    }


def compare(full: Clip, sparse: Clip) -> list[ModeSummary]:
    """Full attention, then the sparse run: PSNR, SSIM and the speed-up of a step; from the same prompt and seed."""
    records = [measure(clip, full.video, "") for clip in (full, sparse)]
    return summarise([full.mode, sparse.mode], records, after_the_first)
