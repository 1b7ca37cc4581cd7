"""What `rectified-spaattn evaluate` does: prepare a folder, fill it with clips, write tables and a report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from ..config import SparseConfig
from ..demo.model import tokenize
from ..demo.prompts import PROMPTS
from ..device import device_of
from ..evaluation import record
from ..evaluation.folder import Folder, write_atomically, write_csv
from ..evaluation.modes import check_names, file_mode, grid_modes, reference_modes
from ..evaluation.paired import FULL, Mode, Pair
from ..evaluation.perceptual import LEAST_SIDE, Lpips, why_no_lpips
from ..evaluation.processes import processes
from ..evaluation.run import Job, complete, missing
from ..evaluation.summary import SCORES, ModeSummary, clip_rows, summarise
from ..report.evaluation import (
    HEADS,
    EvaluationMedia,
    interval,
    scores_figure,
    side_by_side,
    write_evaluation_report,
)
from ..report.html import percent
from ..report.video import write_clip
from .console import print_wide, progress_bars
from .evaluate_options import EvaluateOptions
from .evaluate_pipeline import base_configs, call_settings, given_settings, is_demo, load_pipeline

MODEL_GRID: dict[str, Any] = {"rectify": ("none", SparseConfig().rectify)}
DEMO_GRID: dict[str, Any] = {**MODEL_GRID, "sparsity": (0.8, 0.9)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that a run needs. state: accelerate's PartialState; lpips: what there is to say about it."""

    state: Any
    pipe: Any
    job: Job
    folder: Folder
    pairs: list[Pair]
    manifest: dict[str, Any]
    fps: int


def prepare(options: EvaluateOptions) -> Prepared:
    """Load the pipeline and claim the folder.

    Raises ValueError or TypeError for what cannot be done as asked, and for a folder with other settings.
    """
    state = processes()
    demo = is_demo(options.model)
    prompts = _prompts(options.prompts, demo)
    device = device_of(options.device, state.local_process_index)
    pipe = load_pipeline(options.model, device, options.dtype, options.offload)
    given = given_settings(options)
    settings = call_settings(pipe, given, options.arguments())
    if settings.num_frames < 2:
        raise ValueError(f"frames: got {settings.num_frames}; allowed: 2 or more, since flicker is among the scores.")
    modes = _modes(options, pipe, demo)
    why_not = _why_no_lpips(options.lpips, settings.height, settings.width)
    fps = options.fps or (8 if demo else 16)
    environment = record.environment(device)
    asked = {
        "model": options.model,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": environment["device"]["name"],
        "offload": options.offload,
        "backend": options.backend,
        **{name: getattr(settings, name) for name in given},
        "arguments": settings.arguments,
        "fps": fps,
        "seeds": options.seeds,
        "prompts": prompts,
        "dense_kernel": options.dense_kernel,
        "modes": [
            {
                "name": mode.name,
                "kernel": mode.kernel,
                "configs": [config.to_dict() for config in (mode.config, *mode.more) if config is not None],
            }
            for mode in modes
        ],
        "lpips": why_not is None,
        "versions": environment["versions"],
    }
    facts = {
        "command": options.command,
        "created": environment["created"],
        "processes": state.num_processes,
        "lpips": "Computed with AlexNet." if why_not is None else f"Not computed: {why_not}.",
    }
    folder = Folder(options.out, prompts)
    if state.is_main_process:
        folder.start(asked, facts, write=True)
        folder.clear_partial()
    state.wait_for_everyone()
    folder.start(asked, facts, write=False)
    job = Job(
        modes=modes,
        settings=settings,
        backend=options.backend,
        write_video=partial(write_clip, fps=fps),
        lpips=Lpips(device) if why_not is None else None,
    )
    pairs = [Pair(prompt=prompt, seed=seed) for prompt in prompts for seed in range(options.seeds)]
    return Prepared(
        state=state,
        pipe=pipe,
        job=job,
        folder=folder,
        pairs=pairs,
        manifest={"settings": asked, **facts},
        fps=fps,
    )


def run(prepared: Prepared, console: Console | None = None) -> None:
    """Fill the folder; where everything is there, write clips.csv, summary.csv, scores.png, side-by-side.mp4 and
    report.html, and print the table.
    """
    console = Console() if console is None else console
    state, folder, job = prepared.state, prepared.folder, prepared.job
    if state.is_main_process:
        console.print(f"LPIPS: {prepared.manifest['lpips']}", soft_wrap=True)
    with state.split_between_processes(prepared.pairs) as mine:
        todo = missing(folder, job, mine)
        done = len(mine) * len(job.modes) - sum(map(len, todo.values()))
        with progress_bars(console, disable=not state.is_main_process) as progress:
            watch = _Watch(progress, total=len(mine) * len(job.modes), done=done, steps=job.settings.steps)
            complete(prepared.pipe, job, folder, todo, watch)
            watch.finish()
        for pair in mine:  # of a run that was killed between the last clip of a pair and this
            folder.drop_reference(pair)
    state.wait_for_everyone()
    if state.is_main_process:
        _write(prepared, console)


def _write(prepared: Prepared, console: Console) -> None:
    folder, modes = prepared.folder, prepared.job.modes
    found = [folder.record(mode.name, pair) for pair in prepared.pairs for mode in modes]
    records = [each for each in found if each is not None]
    if len(records) != len(found):
        raise RuntimeError(
            f"{folder.root}: {len(found) - len(records)} clips are missing; did somebody delete files? Run it again."
        )
    summaries, clips = summarise(modes, records), clip_rows(modes, records)
    write_csv(folder.root / "clips.csv", clips)
    write_csv(folder.root / "summary.csv", [each.row() for each in summaries])
    media = EvaluationMedia(figure=folder.root / "scores.png", video=folder.root / "side-by-side.mp4")
    write_atomically(media.figure, lambda to: scores_figure(to, summaries))
    write_atomically(media.video, lambda to: side_by_side(to, folder.root, summaries, records, prepared.fps))
    report = folder.root / "report.html"
    write_atomically(report, lambda to: write_evaluation_report(to, prepared.manifest, summaries, clips, media))
    print_wide(console, summary_table(summaries))
    console.print(f"Report: {report.resolve()}", soft_wrap=True)


def summary_table(summaries: Sequence[ModeSummary]) -> Table:
    """The means as a Markdown table that can be pasted."""
    names = [name for name in SCORES if name in summaries[0].scores]
    table = Table(title=f"{summaries[0].clips} prompt-seed pairs; mean [95% interval]", box=box.MARKDOWN)
    heads = [HEADS[name] for name in names]
    for name in ("attention", "computed pairs", *heads, "s per clip", "s per step", "speed-up", "backend"):
        table.add_column(name, justify="left" if name in ("attention", "backend") else "right", no_wrap=True)
    for each in summaries:
        reference = each.mode.name == FULL
        scores = [
            "reference" if reference and name != "flicker" else interval(each.scores[name], name) for name in names
        ]
        table.add_row(
            each.mode.label,
            percent(each.computed),
            *scores,
            f"{each.seconds:.2f}",
            f"{each.step_seconds:.3f}",
            f"{each.speedup:.2f}x",
            each.backend or "dense",
        )
    return table


def _prompts(path: Path | None, demo: bool) -> list[str]:
    if path is None:
        if not demo:
            raise ValueError("prompts: got no file; allowed: a text file with one prompt a line. Give --prompts FILE.")
        return list(PROMPTS)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    repeated = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if not prompts or repeated:
        got = f"{repeated[0]!r} more than once" if repeated else "no line with text"
        raise ValueError(
            f"{path}: got {got}; allowed: prompts that differ, one a line. --seeds makes more clips of each."
        )
    if demo:
        tokenize(prompts)
    return prompts


def _modes(options: EvaluateOptions, pipe: Any, demo: bool) -> list[Mode]:
    floor = options.floor_kernel or ("math" if demo else "efficient")
    modes = reference_modes(options.dense_kernel, floor)
    grid = options.grid
    if grid.overrides and options.configs and not grid.given():
        raise ValueError(
            f"{', '.join(grid.overrides)}: got a value, but only --config files; allowed: with grid options such as "
            "--sparsity. A file says everything itself."
        )
    if grid.given() or not options.configs:
        default = DEMO_GRID if demo else MODEL_GRID
        grid = replace(grid, **{name: values for name, values in default.items() if not getattr(grid, name)})
        modes += grid_modes(base_configs(pipe, grid.sparsity), grid, options.dense_kernel)
    modes += [file_mode(path, options.dense_kernel) for path in options.configs]
    check_names(modes)
    return modes


def _why_no_lpips(wanted: bool | None, height: int, width: int) -> str | None:
    """Why LPIPS is left out, None where it is computed. Raises ValueError where it is wanted and cannot be."""
    if wanted is False:
        return "--no-lpips"
    reason = why_no_lpips()
    if reason is None and min(height, width) < LEAST_SIDE:
        reason = f"frames of {height} x {width} are too small for AlexNet, which needs sides of {LEAST_SIDE}"
    if wanted and reason is not None:
        raise ValueError(f"lpips: got --lpips, but {reason}; allowed: --no-lpips, or what is missing.")
    return reason


class _Watch:
    """Two bars: the clips of this process, and the steps of the current one."""

    def __init__(self, progress: Progress, total: int, done: int, steps: int) -> None:
        self._progress = progress
        self._done = done
        self._all: TaskID = progress.add_task("clips of this process", total=total, completed=done)
        self._one: TaskID = progress.add_task("warming up" if done < total else "all there", total=steps)

    def __call__(self, mode: Mode, pair: Pair, done: int) -> None:
        if done == 0:
            self._progress.update(self._all, completed=self._done)
            self._done += 1
        caption = pair.prompt if len(pair.prompt) <= 40 else pair.prompt[:39] + "…"
        self._progress.update(self._one, completed=done, description=f"{mode.label}: {caption}, seed {pair.seed}")

    def finish(self) -> None:
        self._progress.update(self._all, completed=self._done)
        self._progress.update(self._one, visible=False)
