"""`rectified-spaattn demo`: generate, measure, draw, write."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from ..demo.model import tokenize
from ..demo.pipeline import WEIGHTS, DemoVideoPipeline, load_demo_pipeline
from ..demo.prompts import PROMPTS
from ..device import device_of
from ..evaluation import record
from ..evaluation.paired import Mode, Pair, Settings, generate, generate_pairs, warm_up
from ..evaluation.scores import means, score
from ..report.html import Media, write_report
from .attention_study import capture_and_warm_up, study_attention
from .console import print_wide, progress_bars
from .demo_options import DemoOptions
from .output import mean_table, write_videos

FRAMES = 16
_TIMING_STEPS = 2


def run(options: DemoOptions, console: Console | None = None) -> Path:
    """The whole demo. Returns the path of report.html.

    Raises SystemExit with a message where there are no weights, and for words that the model does not know.
    """
    console = Console() if console is None else console
    start = time.perf_counter()
    pairs = _pairs(options)
    try:
        pipe = load_demo_pipeline(device_of(options.device), torch.float32, options.weights or WEIGHTS)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    options.out.mkdir(parents=True, exist_ok=True)
    environment = record.environment(pipe.device)
    modes = options.modes()
    settings = Settings(height=options.size, width=options.size, num_frames=FRAMES, steps=options.steps)
    with progress_bars(console) as progress:
        watch = _Watch(progress, len(modes), len(pairs), options.steps)
        watch.say("warming up, and reading one attention call")
        calls = capture_and_warm_up(pipe, pairs[0], settings)
        warm_up(pipe, modes[1:], pairs[0], settings, backend=options.backend)
        clips = generate_pairs(pipe, modes, pairs, settings, backend=options.backend, on_step=watch)
        watch.say("studying the attention call")
        attention, figures = study_attention(calls, options)
        speed = []
        if options.timing_size is not None:
            watch.say(f"timing a step at {options.timing_size} x {options.timing_size}")
            speed = _time_steps(pipe, modes, pairs[0], settings, options.timing_size, options.backend)
        scores = score(clips)
        mean = means(clips, scores)
        watch.say("writing videos and the report")
        media = write_videos(options.out, clips, mean)
        metrics: dict[str, Any] = {
            "command": options.command,
            **environment,
            "load_average_after": record.load_average(),
            "settings": record.settings_record(settings, pipe.transformer.dtype, range(options.seeds), _prompts(pairs)),
            "modes": record.modes_record(modes),
            "means": record.scores_record(mean),
            "comparisons": record.comparisons_record(modes, mean, scores),
            "clips": record.scores_record(scores),
            "attention": attention,
            "speed": speed,
            "seconds_total": time.perf_counter() - start,
        }
        (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        report = options.out / "report.html"
        write_report(report, metrics, Media(video=media.video, still=media.still, figures=figures))
        watch.say("done")
    print_wide(console, mean_table(mean, metrics))
    console.print(f"Report: {report.resolve()}", soft_wrap=True)
    return report


def _pairs(options: DemoOptions) -> list[Pair]:
    """All prompts from the first seed, then all from the next."""
    if not options.captions and options.prompts > len(PROMPTS):
        raise SystemExit(f"--prompts {options.prompts}: there are {len(PROMPTS)}. Use --seeds for more pairs.")
    captions = options.captions or PROMPTS[: options.prompts]
    try:
        tokenize(captions)
    except ValueError as error:
        raise SystemExit(f"--prompt: {error}") from error
    return [Pair(prompt=caption, seed=seed) for seed in range(options.seeds) for caption in captions]


def _prompts(pairs: Sequence[Pair]) -> int:
    return len({pair.prompt for pair in pairs})


def _time_steps(
    pipe: DemoVideoPipeline, modes: Sequence[Mode], pair: Pair, settings: Settings, size: int, backend: str
) -> list[dict[str, Any]]:
    """The fastest denoising step of full and rectified attention at the larger size, after one step of warm-up."""
    timed = [mode for mode in modes if mode.config is None or mode.config.rectify != "none"]
    larger = replace(settings, height=size, width=size, steps=_TIMING_STEPS)
    warm_up(pipe, timed, pair, larger, backend=backend)
    clips = [generate(pipe, mode, pair, larger, backend=backend) for mode in timed]
    return [
        {
            "mode": clip.mode.name,
            "label": clip.mode.label,
            "size": size,
            "density": clip.density,
            "step_seconds": min(clip.steps),
            "speedup": min(clips[0].steps) / min(clip.steps),
        }
        for clip in clips
    ]


class _Watch:
    """Two bars: all denoising steps of the run, and those of the current generation."""

    def __init__(self, progress: Progress, modes: int, pairs: int, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._before = 0  # steps of finished generations
        self._all: TaskID = progress.add_task("all generations", total=modes * pairs * steps)
        self._one: TaskID = progress.add_task("starting", total=steps)

    def say(self, text: str) -> None:
        self._progress.update(self._one, description=text)

    def __call__(self, mode: Mode, pair: Pair, done: int) -> None:
        caption = pair.prompt if len(pair.prompt) <= 40 else pair.prompt[:39] + "…"
        self._progress.update(self._one, completed=done, description=f"{mode.label}: {caption}, seed {pair.seed}")
        self._progress.update(self._all, completed=self._before + done)
        if done == self._steps:
            self._before += done
