"""Why attention error and clip quality part ways on the demo model: when, and at which block size, sparsity hurts.

    python -m studies.causes --pairs 6

Clips against full attention: sparse in the first or the second half of the steps only; other sizes of blocks and clips;
and the noise floor, full attention with the transformer in bfloat16.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import rectified_spaattn as rsa
from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.clips.metrics import psnr, ssim
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.option import option

from . import harness
from .harness import EXACT

SIZES = ((64, 16), (64, 32), (64, 64), (64, 128))  # pixels, tokens a block


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    rectify: tuple[str, ...] = option("Modes.", ("none", "ipar", "ipar+gapr"))


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "variant", "rectify")
    sparsity: float
    variant: str
    rectify: str
    psnr: float
    ssim: float


def clip(
    pipe: Any, pair: Pair, steps: int, size: int, config: SparseConfig | None = None, until: int | None = None
) -> torch.Tensor:
    """One clip [1, T, 3, H, W]; `config` is in force before step `until`."""
    with ExitStack() as stack:
        handle = stack.enter_context(rsa.enable(pipe, config)) if config else None

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if handle is not None and step + 1 == until:
                handle.disable()
            return tensors

        return pipe(
            pair.prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(pair.seed),
            callback_on_step_end=after_step,
        ).frames.float()


def causes(options: Options) -> None:
    """When, and at which block size, sparsity hurts the clips."""
    steps, size = options.steps, options.size
    half = steps // 2

    def measure(pipe, pairs, say):
        pipe.set_progress_bar_config(disable=True)
        for pair in pairs:
            full = {pixels: clip(pipe, pair, steps, pixels) for pixels in {size, *(each for each, _ in SIZES)}}

            def row(sparsity, variant, rectify, video, pixels, pair=pair, full=full):
                say(f"{variant}, {rectify} at {sparsity:g}")
                scores = {"psnr": psnr(video, full[pixels]).item(), "ssim": ssim(video, full[pixels]).item()}
                place = {"prompt": pair.prompt, "seed": pair.seed}
                return Row(**place, sparsity=sparsity, variant=variant, rectify=rectify, **scores)

            low = load_demo_pipeline(pipe.device, torch.bfloat16)
            low.set_progress_bar_config(disable=True)
            yield row(0.0, "full attention", "bfloat16", clip(low, pair, steps, size), size)
            for sparsity in options.sparsity:
                for mode in options.rectify:
                    config = EXACT.replace(sparsity=sparsity, rectify=mode)
                    yield row(sparsity, "first half", mode, clip(pipe, pair, steps, size, config, half), size)
                    second = clip(pipe, pair, steps, size, config.replace(dense_steps=half))
                    yield row(sparsity, "second half", mode, second, size)
                    for pixels, tokens in SIZES:
                        video = clip(pipe, pair, steps, pixels, config.replace(block_size=tokens))
                        yield row(sparsity, f"{pixels} px, block {tokens}", mode, video, pixels)

    def show(rows):
        print(harness.table(rows, ("psnr", "ssim"), {"rectify": "none"}, ("psnr", "ssim")))

    harness.run("causes", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, causes)
