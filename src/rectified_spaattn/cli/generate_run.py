"""`rectified-spaattn generate`: load, run, write, and say what happened."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from ..evaluation.record import device_name
from ..generation import record
from ..generation.compare import Comparison, compare, write_side_by_side
from ..generation.load import Source, call_arguments, dtype_of, find, load, place
from ..generation.request import GenerationError, Request
from ..generation.run import Generated, OnStep, run, switch_on
from ..report.video import write_clip
from .console import print_wide, progress_bars
from .output import mean_table


def generate(request: Request, device: torch.device, console: Console | None = None) -> Path:
    """The whole command. Returns the path of the video or picture. Raises GenerationError where it cannot be made."""
    console = Console() if console is None else console
    source = find(request)
    out = output_path(request, source)
    arguments = call_arguments(source, request)
    shown = dict(arguments)
    if "image" in arguments:
        arguments["image"] = _image(arguments["image"])
    dtype = dtype_of(request, device)
    console.print(f"Loading {source.model} ({source.pipeline.__name__}, {dtype})", soft_wrap=True, highlight=False)
    pipe = load(source, request, dtype)
    place(pipe, device, request.offload)

    enabled = switch_on(pipe, request, device)
    try:
        with _bar(console, "rectified attention") as on_step:
            sparse = run(pipe, request, arguments, device, enabled.handle, on_step)
        ran = record.sparse_result(enabled)
        for summary in ran["summary"]:
            print_wide(console, summary)
    finally:
        enabled.disable()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_clip(out, sparse.clip.video, request.fps)
    fps = request.fps if source.makes_video else None
    told: dict[str, Any] = {
        **record.describe(request, source, pipe, shown, device),
        **ran,
        "output": record.result(sparse, out, fps),
    }
    _write_json(out, told)  # before full attention, which takes longest and may need more memory
    console.print(f"Written: {out} and {out.with_suffix('.json')}", soft_wrap=True, highlight=False)
    if not ran["stats"]["sparse_calls"]:
        console.print("Note: no attention call ran sparse; the lines above say why.", soft_wrap=True, highlight=False)
    if request.compare:
        with _bar(console, "full attention") as on_step:
            full = run(pipe, request, arguments, device, None, on_step)
        told["compare"] = _compared(request, out, full, sparse, fps, device, console)
        _write_json(out, told)
    return out


def output_path(request: Request, source: Source) -> Path:
    """--out, or its default. Raises GenerationError for a suffix that does not fit what the model makes."""
    suffix = ".mp4" if source.makes_video else ".png"
    out = request.out or Path("generated" + suffix)
    if out.suffix != suffix:
        kind = "videos" if source.makes_video else "pictures"
        raise GenerationError(
            f"--out: got {out}; allowed: a name that ends with {suffix}, since {source.pipeline.__name__} makes {kind}."
        )
    return out


def _compared(
    request: Request,
    out: Path,
    full: Generated,
    sparse: Generated,
    fps: int | None,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Writes the full-attention clip and both side by side, and prints the table."""
    comparison = compare(full, sparse)
    full_path, both = (out.with_name(f"{out.stem}-{what}{out.suffix}") for what in ("full", "compare"))
    write_clip(full_path, full.clip.video, request.fps)
    write_side_by_side(both, comparison, full, sparse, request.fps)
    print_wide(console, _table(comparison, full, device))
    console.print(f"Side by side: {both}", soft_wrap=True, highlight=False)
    return {
        "full": record.result(full, full_path, fps),
        "side_by_side": both.name,
        "scores": comparison.record(),
    }


def _table(comparison: Comparison, full: Generated, device: torch.device) -> Any:
    frames, _, height, width = full.clip.video.shape
    settings = {"height": height, "width": width, "num_frames": frames, "steps": len(full.clip.steps)}
    return mean_table(comparison.rows, {"settings": settings, "device": {"name": device_name(device)}})


def _image(path: str) -> Any:
    """A picture from a file or an address."""
    from diffusers.utils import load_image

    if not path.startswith(("http://", "https://")) and not Path(path).is_file():
        raise GenerationError(f"--image: got {path}; allowed: a picture file or an address, and there is no such file.")
    return load_image(path)


def _write_json(out: Path, told: dict[str, Any]) -> None:
    out.with_suffix(".json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")


@contextmanager
def _bar(console: Console, what: str) -> Iterator[OnStep]:
    """A bar of the denoising steps with the density of the last one."""
    more = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[density]}"))
    with progress_bars(console, *more) as progress:
        task = progress.add_task(what, total=None, density="")

        def on_step(done: int, total: int, density: float | None) -> None:
            told = "skipped" if density is None else f"density {density:.1%}"
            progress.update(task, completed=done, total=total, density=told)

        yield on_step
