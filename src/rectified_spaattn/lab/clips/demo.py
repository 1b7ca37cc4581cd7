"""The demo: an evaluation of the demo model with plain sparse attention, the paper's mode and the default."""

from typing import Any

import torch

from ..demo_model.model import tokenize
from ..demo_model.prompts import PROMPTS
from ..pages.video import FPS
from .clip import Mode, Pair, full_mode, generate, warm_up
from .evaluate import Evaluation
from .models import demo_source
from .options import DemoOptions, ModelOptions

FRAMES = 16
WIDTH = 384  # of a clip's video, in pixels
_TIMING_SIZE, _TIMING_STEPS = 96, 2


def evaluation_of(options: DemoOptions, device: torch.device) -> Evaluation:
    """Full attention, then sparse, rectified as in the paper, and this package's default at every sparsity.

    Raises ValueError for words that the model does not know and more prompts than there are.
    """
    if not options.prompt and (options.prompts or 0) > len(PROMPTS):
        raise ValueError(f"prompts: got {options.prompts}; allowed: up to {len(PROMPTS)}. --seeds makes more clips.")
    captions = options.prompt or PROMPTS[: options.prompts or (1 if options.quick else 3)]
    tokenize(captions)
    modes = [full_mode()]
    for sparsity in options.sparsity:
        paper = options.paper(sparsity)
        words = {"sparse": paper.replace(rectify="none"), "rectified": paper, "default": options.default(sparsity)}
        for word, config in words.items():
            share = f"{100 * sparsity:g}"
            modes.append(Mode(name=f"{word}-{share}", label=f"{word} {share}%", configs=(config,)))
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
            "num_inference_steps": options.steps or (6 if options.quick else 12),
        },
        fps=FPS,
        width=WIDTH,
    )


def time_steps(pipe: Any, evaluation: Evaluation, pair: Pair) -> list[dict[str, Any]]:
    """The fastest denoising step of full and rectified attention at 96 x 96, after one step of warm-up."""
    timed = [mode for mode in evaluation.modes if mode.config is None or mode.config.rectify != "none"]
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
