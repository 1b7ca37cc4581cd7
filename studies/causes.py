"""Why attention error and clip quality part ways on the demo model: when, where and at which block size sparsity hurts.

    python benchmarks/demo_causes.py [--prompts 8] [--device auto] [--out runs/causes]

Three studies against full attention, each over the same prompts, seed 0, printed as Markdown and written as CSV:
steps (sparse in the first or the second half of the steps only), blocks (block size and clip size), and the noise floor
(full attention with the transformer in bfloat16).
"""

import contextlib
import sys
from pathlib import Path

import torch
import typer
from rich.progress import Progress

import rectified_spaattn as rsa
from demo_quality import table, write
from rectified_spaattn import SparseConfig
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.metrics import psnr, ssim

STEPS = 12
MODES = ("none", "ipar", "ipar+gapr")


def clip(pipe, prompt: str, size: int, config: SparseConfig | None = None, until: int = STEPS):
    """One clip [1, T, 3, H, W]; `config` is in force before step `until`."""
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(rsa.enable(pipe, config)) if config else None

        def stop(pipe, step, timestep, tensors):
            if handle is not None and step + 1 == until:
                handle.disable()
            return tensors

        noise = torch.Generator().manual_seed(0)
        return pipe(
            prompt, height=size, width=size, num_inference_steps=STEPS, generator=noise, callback_on_step_end=stop
        ).frames.float()


def main(prompts: int = 8, device: str = "auto", out: Path = Path("runs/causes")) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_demo_pipeline(device)
    pipe.set_progress_bar_config(disable=True)
    half = load_demo_pipeline(device, torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    studies: dict[str, list] = {"steps": [], "blocks": [], "floor": []}

    def base(sparsity: float, mode: str, block_size: int, dense_steps: int = 0) -> SparseConfig:
        return SparseConfig(
            sparsity=sparsity,
            rectify=mode,
            block_size=block_size,
            order="gilbert",
            dense_steps=dense_steps,
            neighbours=False,
            top_p=0.0,
        )

    with Progress() as progress:
        for prompt in progress.track(PROMPTS[:prompts], description="prompts"):
            full = {size: clip(pipe, prompt, size) for size in (64, 96)}

            def note(study, variant, sparsity, video, size, prompt=prompt, full=full):
                scores = {"psnr": psnr(video, full[size]).item(), "ssim": ssim(video, full[size]).item()}
                row = {"sparsity": sparsity, "variant": variant, "prompt": prompt, "seed": 0, **scores}
                studies[study].append(row)

            note("floor", "full attention, bfloat16", 0.0, clip(half, prompt, 64), 64)
            for sparsity in (0.8, 0.9):
                for mode in MODES:
                    first = clip(pipe, prompt, 64, base(sparsity, mode, 64), until=STEPS // 2)
                    second = clip(pipe, prompt, 64, base(sparsity, mode, 64, STEPS // 2))
                    note("steps", f"first half, {mode}", sparsity, first, 64)
                    note("steps", f"second half, {mode}", sparsity, second, 64)
                for size, block_size in ((64, 16), (64, 32), (64, 64), (96, 32), (96, 64), (96, 128)):
                    for mode in MODES:
                        video = clip(pipe, prompt, size, base(sparsity, mode, block_size))
                        note("blocks", f"{size} px, block {block_size}, {mode}", sparsity, video, size)
    print(f"\n{prompts} prompts, seed 0, {STEPS} steps; torch {torch.__version__} on {device}; {' '.join(sys.argv)}")
    for name, rows in studies.items():
        rows.sort(key=lambda row: (row["sparsity"], row["variant"]))
        write(rows, out / f"{name}.csv")
        print(f"\n{name}\n\n{table(rows, ('psnr', 'ssim'))}")


if __name__ == "__main__":
    typer.run(main)
