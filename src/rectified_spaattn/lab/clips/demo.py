"""The demo: an evaluation of the demo model, full, plain sparse, paper and ours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...config import SparseConfig
from ..demo_model.model import tokenize
from ..demo_model.prompts import PROMPTS
from ..pages.styles import is_ours, label, label_of
from ..pages.video import FPS
from .clip import Mode, Pair, full_mode, generate, warm_up
from .evaluate import Evaluation
from .models import demo_source
from .options import DemoOptions, ModelOptions

FRAMES = 16
WIDTH = 384  # of a clip's video, in pixels
SLIDER = (0.5, 0.7, 0.8, 0.9, 0.95)  # sparsities of ours on the first prompt
_TIMING_SIZE, _TIMING_STEPS = 96, 2


def evaluation_of(options: DemoOptions, device: torch.device) -> Evaluation:
    """Full attention, then plain sparse, the paper and ours at every sparsity; a quick one without the paper.

    Raises ValueError for words that the model does not know and more prompts than there are.
    """
    if not options.prompt and (options.prompts or 0) > len(PROMPTS):
        raise ValueError(f"prompts: got {options.prompts}; allowed: up to {len(PROMPTS)}. --seeds makes more clips.")
    captions = options.prompt or PROMPTS[: options.prompts or (1 if options.quick else 3)]
    tokenize(captions)
    kinds = (options.plain, options.ours) if options.quick else (options.plain, options.paper, options.ours)
    modes = [full_mode(), *(_mode(kind(sparsity)) for kind in kinds for sparsity in options.sparsity)]
    return Evaluation(
        options=ModelOptions(backend=options.backend, device=options.device),
        source=demo_source(options.weights),
        device=device,
        modes=modes,
        prompts={caption: {} for caption in captions},
        seeds=options.seeds,
        arguments={
            "height": options.size,
            "width": options.size,
            "num_frames": FRAMES,
            "num_inference_steps": options.steps,
        },
        fps=FPS,
        width=WIDTH,
    )


def with_slider(evaluation: Evaluation, options: DemoOptions) -> Evaluation:
    """The first prompt and seed alone, with ours at the sparsities of SLIDER, too, but for a quick one."""
    more = () if options.quick else [_mode(options.ours(each)) for each in SLIDER if each not in options.sparsity]
    first = evaluation.pairs[0].prompt
    return replace(evaluation, modes=[*evaluation.modes, *more], prompts={first: {}}, seeds=1)


def ours_of(modes: Sequence[Mode]) -> list[Mode]:
    """By rising sparsity."""
    return sorted((mode for mode in modes if is_ours(mode.config)), key=lambda mode: mode.configs[0].sparsity)


def _mode(config: SparseConfig) -> Mode:
    name = label(config.rectify, config.order).split(" ")[0]
    return Mode(name=f"{name}-{100 * config.sparsity:g}", label=label_of(config), configs=(config,))


def time_steps(pipe: Any, evaluation: Evaluation, pair: Pair) -> list[dict[str, Any]]:
    """The fastest denoising step of full attention and ours at 96 x 96, after one step of warm-up."""
    timed = [evaluation.modes[0], *ours_of(evaluation.modes)]
    size = {"height": _TIMING_SIZE, "width": _TIMING_SIZE, "num_inference_steps": _TIMING_STEPS}
    larger, backend = {**evaluation.arguments, **size}, evaluation.options.backend
    warm_up(pipe, timed, pair, larger, backend=backend)
    clips = [clip for mode in timed for clip in generate(pipe, mode, [pair], larger, backend=backend)]
    return [
        {
            "mode": clip.mode.name,
            "label": clip.mode.label,
            "size": _TIMING_SIZE,
            "density": clip.density,
            "step_seconds": min(clip.steps),
            "speedup": min(clips[0].steps) / min(clip.steps),
        }
        for clip in clips
    ]
