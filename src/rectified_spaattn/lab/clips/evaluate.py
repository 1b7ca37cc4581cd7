"""Paired clips that can be stopped and gone on with: every prompt and seed under every mode, one file a clip."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from ...config import SparseConfig
from ...pipelines.adapters import default_configs
from ..demo_model.model import tokenize
from ..demo_model.prompts import PROMPTS
from ..machine import machine
from ..pages.styles import FULL, IN_SPACE
from ..pages.video import write_clip
from .clip import Clip, Mode, Pair, check_kernel, check_sparse, generate, warm_up
from .folder import Folder
from .metrics import Lpips, why_no_lpips
from .models import Source, call_arguments, call_defaults, dtype_of, file_hash, with_pictures
from .modes import check_names, check_schedule, file_mode, grid_modes, preset_mode, reference_modes
from .options import SMALL_GRID, ClipError, EvaluateOptions, ModelOptions
from .prompts import Prompts, read_prompts
from .summary import ClipRecord, measure

OnClip = Callable[[Mode, Pair, int], None]  # (mode, pair, steps done so far)
_PATIENCE = timedelta(days=14)  # a process that is done waits for the others, which may have hours of work left


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What is made. modes: full attention first.

    prompts    with the pictures of those that have some of their own
    arguments  of the pipeline's call, pictures as paths
    width      of the videos in pixels, None for the clips' own
    no_lpips   why LPIPS is left out, None where it is computed
    """

    options: ModelOptions
    source: Source
    device: torch.device
    modes: Sequence[Mode]
    prompts: Prompts
    seeds: int
    arguments: Mapping[str, Any]
    fps: int
    width: int | None = None
    no_lpips: str | None = "--no-lpips"

    @property
    def pairs(self) -> list[Pair]:
        return [Pair(prompt=prompt, seed=seed) for prompt in self.prompts for seed in range(self.seeds)]

    def call(self) -> dict[str, Any]:
        """What the pipeline is called with for every prompt alike, its own defaults included."""
        return call_defaults(self.source) | dict(self.arguments)

    def call_of(self, pair: Pair) -> dict[str, Any]:
        """Further arguments of the pipeline's call for one clip, its pictures read."""
        return with_pictures(dict(self.arguments) | self.prompts[pair.prompt])

    def settings(self) -> dict[str, Any]:
        """Everything that has an influence on a clip, for the manifest."""
        where = machine(self.device)
        dtype = dtype_of(self.source, self.options.dtype, self.device)
        return {
            "model": self.source.model,
            "revision": self.source.revision,
            "pipeline": self.source.pipeline.__name__,
            "dtype": str(dtype).removeprefix("torch."),
            "device": where.device["name"],
            "offload": self.options.offload,
            "backend": self.options.backend,
            "scheduler": self.options.scheduler_changes(),
            "call": self.call(),
            "image_sha256": file_hash(self.options.image),
            "last_image_sha256": file_hash(self.options.last_image),
            "pictures": {
                prompt: {name: {"file": path, "sha256": file_hash(path)} for name, path in pictures.items()}
                for prompt, pictures in self.prompts.items()
                if pictures
            },
            "fps": self.fps,
            "seeds": self.seeds,
            "prompts": list(self.prompts),
            "modes": [mode.settings() for mode in self.modes],
            "lpips": self.no_lpips is None,
            "versions": where.versions,
        }

    def facts(self, command: str, processes: int = 1) -> dict[str, Any]:
        """What else is worth knowing, for the manifest."""
        return {
            "command": command,
            "created": machine(self.device).created,
            "processes": processes,
            "lpips": "Computed with AlexNet." if self.no_lpips is None else f"Not computed: {self.no_lpips}.",
        }


def evaluation_of(options: EvaluateOptions, source: Source, device: torch.device) -> Evaluation:
    """What the options ask for, checked as far as it can be without weights, and so without sparse modes yet.

    Raises ValueError, TypeError or ClipError, saying what to change.
    """
    prompts = prompts_of(options, source)
    arguments = call_arguments(source, options)
    floor = options.floor_kernel or ("math" if source.is_demo or device.type == "cpu" else "efficient")
    check_kernel(floor, device, dtype_of(source, options.dtype, device))
    for pictures in prompts.values() or [{}]:
        with_pictures(arguments | pictures)  # an unreadable one is told now
    call = call_defaults(source) | arguments
    return Evaluation(
        options=options,
        source=source,
        device=device,
        modes=reference_modes(floor),
        prompts=prompts,
        seeds=options.seeds,
        arguments=arguments,
        fps=options.fps or (8 if source.is_demo else 16),
        no_lpips=_why_no_lpips(options.lpips, call.get("height"), call.get("width")),
    )


def with_sparse_modes(evaluation: Evaluation, options: EvaluateOptions, pipe: Any) -> Evaluation:
    """With the modes of the grid and of the files. Raises TypeError or ValueError as SparseConfig does."""
    modes, grid = list(evaluation.modes), options.grid()
    if any(grid.values()) or not (options.config or options.preset):
        if evaluation.source.is_demo and not (grid["sparsity"] or grid["tolerance"]):
            grid["sparsity"] = (0.8, 0.9)
        plain, ours = {"rectify": ("none",), "order": (IN_SPACE,)}, {"rectify": (SparseConfig().rectify,)}
        base = base_configs(evaluation.source, pipe)
        for each in ({},) if grid["rectify"] or grid["order"] else (plain, ours):
            modes += grid_modes(base, grid | each, options.overrides())
    modes += [preset_mode(name) for name in options.preset]
    modes += [file_mode(path) for path in options.config]
    check_names(modes)
    check_schedule(modes, evaluation.call().get("num_inference_steps"))
    return replace(evaluation, modes=modes)


def processes() -> Any:
    """accelerate's PartialState: alone, or one of those that `accelerate launch` or `torchrun` started.

    They only exchange files and a few small objects, over gloo; so more of them than GPUs may be started.
    """
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=_PATIENCE)


def missing(folder: Folder, modes: Sequence[Mode], pairs: Sequence[Pair]) -> dict[Pair, list[Mode]]:
    """The modes of every pair that have no finished clip yet; pairs without any such mode are left out."""
    todo = {pair: [mode for mode in modes if folder.record(mode.name, pair) is None] for pair in pairs}
    return {pair: modes for pair, modes in todo.items() if modes}


def complete(
    pipe: Any, evaluation: Evaluation, folder: Folder, todo: dict[Pair, list[Mode]], on_step: OnClip
) -> Iterator[Clip]:
    """Generate and measure what is missing, pair after pair, so that a busy machine disturbs all modes alike.

    todo: what `missing` gave. on_step(mode, pair, steps done) is called before a clip and after each of its steps.
    Yields every clip that is finished. One step of every mode is run before anything is timed. Raises ClipError as
    `generate` does.
    """
    if not todo:
        return
    backend, first = evaluation.options.backend, next(iter(todo))
    lpips = Lpips(evaluation.device) if evaluation.no_lpips is None else None
    needed = {mode.name: mode for modes in todo.values() for mode in modes}
    warm_up(pipe, list(needed.values()), first, evaluation.call_of(first), backend=backend)

    def make(mode: Mode, pair: Pair, arguments: Mapping[str, Any]) -> Clip:
        on_step(mode, pair, 0)
        advance = lambda done, total, density: on_step(mode, pair, done)  # noqa: E731
        [clip] = generate(pipe, mode, [pair], arguments, backend=backend, on_step=advance)
        check_sparse(clip)
        return clip

    def keep(clip: Clip, reference: torch.Tensor) -> Clip:
        """The video, then its record, which says that both are there."""
        path = folder.video(clip.mode.name, clip.pair)
        write_clip(path, clip.video, evaluation.fps, evaluation.width)
        folder.write_record(measure(clip, reference, path.relative_to(folder.root).as_posix(), lpips))
        return clip

    for pair, modes in todo.items():
        arguments = evaluation.call_of(pair)
        reference = folder.read_reference(pair)
        if reference is None or modes[0].name == FULL:
            clip = make(evaluation.modes[0], pair, arguments)
            reference = clip.video
            folder.write_reference(pair, reference)
            if modes[0].name == FULL:
                yield keep(clip, reference)
        for mode in modes:
            if mode.name != FULL:
                yield keep(make(mode, pair, arguments), reference)
        folder.drop_reference(pair)


def records_of(evaluation: Evaluation, folder: Folder) -> list[ClipRecord]:
    """All clips in the order of pairs and modes. Raises ClipError where some are missing."""
    entries = [folder.record(mode.name, pair) for pair in evaluation.pairs for mode in evaluation.modes]
    if None in entries:
        lost = entries.count(None)
        raise ClipError(f"{folder.root}: {lost} clips are missing; did somebody delete files? Run it again.")
    return [each for each in entries if each is not None]


def prompts_of(options: EvaluateOptions, source: Source) -> Prompts:
    """Those of the file, or the demo's captions. Raises ValueError as `read_prompts` and the demo's tokenizer do."""
    if options.prompts is None and not source.is_demo:
        raise ValueError("prompts: got no file; allowed: a text file with one prompt a line. Give --prompts FILE.")
    prompts = {prompt: {} for prompt in PROMPTS} if options.prompts is None else read_prompts(options.prompts)
    if source.is_demo:
        tokenize(list(prompts))
    return prompts


def base_configs(source: Source, pipe: Any) -> tuple[SparseConfig, ...]:
    """What configurations start from: exact sparsity on the demo model's small grid, else the model's preset."""
    if source.is_demo:
        return (SparseConfig.from_dict(SMALL_GRID),)
    return default_configs(pipe.transformer, pipe)


def _why_no_lpips(wanted: bool | None, height: int | None, width: int | None) -> str | None:
    """Why LPIPS is left out, None where it is computed. Raises ValueError where it is wanted and cannot be."""
    if wanted is False:
        return "--no-lpips"
    reason = why_no_lpips(height, width)
    if wanted and reason is not None:
        raise ValueError(f"lpips: got --lpips, but {reason}; allowed: --no-lpips, or what is missing.")
    return reason
