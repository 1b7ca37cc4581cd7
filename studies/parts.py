"""Which step of the method helps, measured on the demo model: clips against full attention, and single attention calls.

    python benchmarks/demo_quality.py [--prompts 8] [--seeds 1] [--size 64] [--block-size 64] [--out runs/quality]

Writes clips.csv and attention.csv and prints both as Markdown tables: mean and 95% interval over the prompt-seed pairs.
"""

import csv
import itertools
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.config import RECTIFY_MODES
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.attention_error import block_masses, full_attention
from rectified_spaattn.evaluation.capture import AttentionCall, capture_attention, end_after
from rectified_spaattn.evaluation.paired import Mode, Pair, Settings, full_mode, generate
from rectified_spaattn.evaluation.scores import score
from rectified_spaattn.method.estimate import estimate, estimate_pooled
from rectified_spaattn.method.gain import gain
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.rectify import rectify

Rows = list[dict[str, str | float]]


def clip_rows(pipe, pairs: list[Pair], settings: Settings, sparsities: list[float], block_size: int) -> Rows:
    """PSNR and SSIM of every mode at every sparsity, one row a clip; all modes share the selection but "pooled"."""
    modes = [
        Mode(name=f"{mode} {sparsity:g}", label=mode, config=_config(sparsity, mode, block_size))
        for sparsity, mode in itertools.product(sparsities, RECTIFY_MODES)
    ]
    rows: Rows = []
    with Progress() as progress:
        task = progress.add_task("clips", total=len(pairs) * (len(modes) + 1))
        for pair in pairs:
            clips = []
            for mode in (full_mode(), *modes):
                clips.append(generate(pipe, mode, pair, settings))
                progress.advance(task)
            for clip, result in zip(clips[1:], score(clips)[1:], strict=True):
                config = clip.mode.config
                rows.append(
                    {
                        "sparsity": config.sparsity,
                        "variant": config.rectify,
                        "prompt": pair.prompt,
                        "seed": pair.seed,
                        "psnr": result.psnr,
                        "ssim": result.ssim,
                        "density": result.density,
                    }
                )
    return rows


def attention_rows(pipe, pairs: list[Pair], settings: Settings, sparsities: list[float], block_size: int) -> Rows:
    """Output error of single calls (all layers, three steps) with parts of the rectification left out; equal blocks."""
    rows: Rows = []
    steps = [settings.steps // 4, settings.steps // 2, settings.steps * 3 // 4]
    with Progress() as progress:
        task = progress.add_task("attention calls", total=len(pairs) * len(steps))
        for pair, step in itertools.product(pairs, steps):
            with capture_attention(pipe, step=step) as calls:
                generate(pipe, full_mode(), pair, settings, after_step=end_after(step))
            for call, sparsity in itertools.product(calls, sparsities):
                place = {"sparsity": sparsity, "prompt": pair.prompt, "seed": pair.seed, "step": step}
                rows += [{**place, "layer": call.layer, **row} for row in _variants(call, sparsity, block_size)]
            progress.advance(task)
    return rows


def _variants(call: AttentionCall, sparsity: float, block_size: int) -> Rows:
    """One row a variant: relative error on the tiled tokens; exact and estimated mass that was kept; share accepted."""
    layout, scale = call.layout(block_size), call.q.shape[-1] ** -0.5
    q, k, v = (_tiles(x, layout) for x in (call.q, call.k, call.v))
    k_alone = call.k[:, layout.isolated].transpose(1, 2)
    valid = torch.cat([call.text_mask.new_ones(len(call.text_mask), layout.leftover), call.text_mask], dim=1)
    pooled = pool(q, k, v)
    keys = {"q_mean": pooled.q, "k_mean": pooled.k, "k_isolated": k_alone, "valid": valid, "scale": scale}
    exact = _tiles(full_attention(call), layout)
    plain, stats = rectified_attention(
        call.q,
        call.k,
        call.v,
        layout,
        _config(sparsity, "none", block_size),
        text_mask=call.text_mask,
        return_stats=True,
    )
    sparse, critical = _tiles(plain, layout), stats.block_mask
    every, gated = ~critical, gain(pooled, critical, "ipar+gapr")
    ipar = rectify(estimate(**keys, block_size=block_size), every, pooled.v)
    no_log_b = rectify(estimate(**keys, block_size=1), every, pooled.v)
    text_pooled = rectify(estimate_pooled(**keys, block_size=block_size, leftover=layout.leftover), every, pooled.v)
    paper = rectify(estimate(**keys, block_size=block_size), gated, pooled.v)
    outputs = {
        "none": sparse,
        "pooled: text pooled, no log b": _apply(sparse, text_pooled.r, text_pooled.c),
        "text isolated, no log b": _apply(sparse, no_log_b.r, no_log_b.c),
        "ipar": _apply(sparse, ipar.r, ipar.c),
        "ipar, R only": _apply(sparse, ipar.r, 0 * ipar.c),
        "ipar, C only": _apply(sparse, torch.ones_like(ipar.r), ipar.c),
        "ipar+gapr": _apply(sparse, paper.r, paper.c),
        "exact mass of every row for R, C as in ipar": _row_masses(call, layout, critical) * sparse
        + ipar.c[..., None, :],
    }
    exact_p = torch.stack([block_masses(call, layout, head) for head in range(q.shape[1])])[None]
    shared = {
        "kept_mass": _kept(exact_p, critical),
        "estimated": _kept(stats.probability, critical),
        "accepted": (gated.sum() / every.sum()).item(),
    }
    return [
        {"variant": name, "relative_error": ((out - exact).norm() / exact.norm()).item(), **shared}
        for name, out in outputs.items()
    ]


def _kept(probability: torch.Tensor, critical: torch.Tensor) -> float:
    """Mean mass on critical blocks and isolated tokens. probability: [B, H, nb, nb + 1]."""
    return ((probability[..., :-1] * critical).sum(-1) + probability[..., -1]).mean().item()


def _row_masses(call: AttentionCall, layout: TokenLayout, critical: torch.Tensor) -> torch.Tensor:
    """Exact mass that every single query gives to its critical blocks and the isolated tokens: [B, H, nb, b, 1]."""
    q, k = (x.transpose(1, 2) for x in (call.q, call.k))
    valid = torch.cat([call.text_mask.new_ones(len(call.text_mask), layout.video), call.text_mask], dim=1)
    logits = q[:, :, layout.tiled] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, nb * b, S]
    logits.masked_fill_(~valid[:, None, None], -math.inf)
    to_blocks = logits.softmax(-1)[..., layout.tiled].unflatten(-1, (layout.num_blocks, layout.block_size)).sum(-1)
    dropped = ~critical.repeat_interleave(layout.block_size, 2)  # [B, H, nb * b, nb]
    kept = 1 - (to_blocks * dropped).sum(-1, keepdim=True)
    return kept.unflatten(2, (layout.num_blocks, layout.block_size))


def _apply(sparse: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # [B, H, nb, b, D], [B, H, nb], [B, H, nb, D]
    return sparse * r[..., None, None] + c[..., None, :]


def _tiles(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    # [B, S, H, D] -> [B, H, nb, b, D]
    return x[:, layout.tiled].transpose(1, 2).unflatten(2, (layout.num_blocks, layout.block_size))


def _config(sparsity: float, mode: str, block_size: int) -> SparseConfig:
    # exact sparsity: on grids this small the 26 neighbours alone would be a quarter of all blocks
    return SparseConfig(
        sparsity=sparsity, rectify=mode, block_size=block_size, order="gilbert", neighbours=False, top_p=0.0
    )


def table(rows: Rows, columns: tuple[str, ...]) -> str:
    """A Markdown table: mean and 95% interval of the mean over prompt-seed pairs, one line a sparsity and variant."""
    lines = [
        "| sparsity | variant | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for sparsity, variant in dict.fromkeys((row["sparsity"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["sparsity"], row["variant"]) == (sparsity, variant)]
        cells = [_interval(mine, column) for column in columns]
        lines.append(f"| {sparsity:.0%} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_layer(rows: Rows, sparsity: float) -> str:
    """A Markdown table at one sparsity: layers down, the first and last captured step across."""
    steps = sorted({row["step"] for row in rows})
    variants = ("none", "ipar", "ipar+gapr", "exact mass of every row for R, C as in ipar")
    columns = [(variant, "relative_error") for variant in variants]
    columns += [("none", "kept_mass"), ("none", "estimated")]
    names = ["error none", "error ipar", "error ipar+gapr", "error exact R", "kept mass", "estimated"]
    lines = [
        f"| layer, {sparsity:.0%} | step | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for layer, step in itertools.product(sorted({row["layer"] for row in rows}), (steps[0], steps[-1])):
        here = [row for row in rows if (row["layer"], row["step"], row["sparsity"]) == (layer, step, sparsity)]
        cells = [fmean(row[value] for row in here if row["variant"] == variant) for variant, value in columns]
        lines.append(f"| {layer} | {step} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _interval(rows: Rows, column: str) -> str:
    by_pair: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        by_pair.setdefault((row["prompt"], row["seed"]), []).append(row[column])
    values = [fmean(each) for each in by_pair.values()]
    spread = f" ± {1.96 * stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def write(rows: Rows, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(
    prompts: int = 8,
    seeds: int = 1,
    size: int = 64,
    steps: int = 12,
    block_size: int = 64,
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    device: str = "auto",
    out: Path = Path("runs/quality"),
) -> None:
    sparsities = sparsity or [0.8, 0.9]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_demo_pipeline(device)
    pairs = [Pair(prompt=prompt, seed=seed) for prompt in PROMPTS[:prompts] for seed in range(seeds)]
    settings = Settings(height=size, width=size, num_frames=16, steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    clips = clip_rows(pipe, pairs, settings, sparsities, block_size)
    write(clips, out / "clips.csv")
    calls = attention_rows(pipe, pairs, settings, sparsities, block_size)
    write(calls, out / "attention.csv")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{len(pairs)} prompt-seed pairs, 16 x {size} x {size}, {steps} steps, block {block_size}; {where}; ", end=""
    )
    print(f"torch {torch.__version__}; {' '.join(sys.argv)}\n")
    print(table(clips, ("psnr", "ssim", "density")), "\n")
    print(table(calls, ("relative_error", "kept_mass", "estimated", "accepted")), "\n")
    print(by_layer(calls, sparsities[-1]))


if __name__ == "__main__":
    typer.run(main)
