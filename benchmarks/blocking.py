"""What order, block size, neighbours and top-p are worth, on attention inputs of the demo model.

    python benchmarks/blocking.py [--prompts 6] [--size 64] [--rectify ipar+gapr] [--out runs/blocking]

Attention calls of full-attention runs, two layers at two steps, seed 0. Neighbours and top-p keep more blocks than
the sparsity asks for, so each is also compared with as many blocks chosen by P alone ("equal pairs"). Writes
blocking-SIZE.csv, one line a prompt and setting (means over layers and steps), and prints a Markdown table: mean [95%
interval over the prompts].
"""

import itertools
import math
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from rectified_spaattn import SparseConfig
from rectified_spaattn.attention import density
from rectified_spaattn.benchmark.record import machine, write_csv
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.attention_error import full_attention
from rectified_spaattn.evaluation.capture import AttentionCall, capture_calls
from rectified_spaattn.evaluation.intervals import bootstrap
from rectified_spaattn.evaluation.paired import Pair, Settings
from rectified_spaattn.evaluation.selection import (
    best_as_many,
    captured_mass,
    estimated_masses,
    output_error,
    true_masses,
)
from rectified_spaattn.method.select import select

STEPS = 12
ORDERS, BLOCK_SIZES, SPARSITIES, TOP_P = ("gilbert", "tile", "raster"), (64, 128), (0.8, 0.9), 0.3
MEASURES = ("density", "captured", "error", "equal_captured", "equal_error")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to cut and choose blocks. Sorted: plain selections first."""

    order: str
    block_size: int
    sparsity: float
    neighbours: bool
    top_p: float

    def config(self, rectify: str) -> SparseConfig:
        return SparseConfig(
            order=self.order,
            block_size=self.block_size,
            sparsity=self.sparsity,
            neighbours=self.neighbours,
            top_p=self.top_p,
            rectify=rectify,
        )


@dataclass(frozen=True, kw_only=True)
class Row(Setting):
    """Means over the calls of one prompt.

    density   computed query-key pairs over all pairs
    captured  full-attention mass on the critical blocks and the isolated tokens
    error     |out - full| / |full| over the tiled tokens
    equal_*   the same for as many blocks in all, chosen by P alone
    """

    prompt: str
    seed: int
    rectify: str
    density: float
    captured: float
    error: float
    equal_captured: float
    equal_error: float


def settings_of(orders: list[str]) -> list[Setting]:
    return [
        Setting(order=order, block_size=size, sparsity=sparsity, neighbours=neighbours, top_p=top_p)
        for order, size, sparsity, neighbours, top_p in itertools.product(
            orders, BLOCK_SIZES, SPARSITIES, (False, True), (0.0, TOP_P)
        )
    ]


def measure(call: AttentionCall, settings: list[Setting], rectify: str) -> dict[Setting, list[float]]:
    """MEASURES of every setting on one call."""
    full = full_attention(call)
    found = {}
    for (order, size), group in itertools.groupby(settings, key=lambda each: (each.order, each.block_size)):
        layout = call.layout(size, order)
        true, estimated = true_masses(call, layout), estimated_masses(call, layout)
        known: dict[bytes, tuple[float, float]] = {}  # settings often keep the same blocks

        def judge(kept, config, known=known, layout=layout, true=true):
            key = kept.numpy().tobytes()
            if key not in known:
                known[key] = (captured_mass(kept, true), output_error(call, layout, config, kept, full))
            return known[key]

        for setting in group:
            config = setting.config(rectify)
            kept = select(estimated[None], layout, config)[0]
            as_many = best_as_many(estimated[..., :-1], kept)
            pairs = density(kept[None], layout, call.text_mask).item()
            found[setting] = [pairs, *judge(kept, config), *judge(as_many, config)]
    return found


def rows_of(pipe, pair: Pair, run: Settings, layers, steps, settings, rectify: str, advance) -> list[Row]:
    found = defaultdict(list)
    for step in steps:
        for call in capture_calls(pipe, pair, run, step=step, layers=layers):
            for setting, values in measure(call, settings, rectify).items():
                found[setting].append(values)
            advance()
    return [
        Row(
            **vars(setting),
            prompt=pair.prompt,
            seed=pair.seed,
            rectify=rectify,
            **dict(zip(MEASURES, map(fmean, zip(*values, strict=True)), strict=True)),
        )
        for setting, values in found.items()
    ]


def table(rows: list[Row], settings: list[Setting]) -> str:
    lines = [
        "| sparsity | order | block | neighbours | top-p | pairs | captured mass | error | at equal pairs | gap |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in sorted(settings, key=lambda each: each.sparsity):
        mine = [row for row in rows if all(getattr(row, name) == value for name, value in vars(setting).items())]
        plain = not setting.neighbours and not setting.top_p
        cells = [f"{setting.sparsity:.0%}", setting.order, str(setting.block_size)]
        cells += ["yes" if setting.neighbours else "no", f"{setting.top_p:g}"]
        cells += [f"{fmean(row.density for row in mine):.1%}", f"{fmean(row.captured for row in mine):.3f}"]
        cells += [interval([row.error for row in mine])]
        cells += (
            ["", ""]
            if plain
            else [
                f"{fmean(row.equal_error for row in mine):.3f}",
                interval([row.error - row.equal_error for row in mine], "+"),
            ]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(rows: list[Row], orders: list[str], reference: tuple[str, int]) -> str:
    """Orders and block sizes without neighbours and top-p, prompt by prompt against one of them."""
    lines = []
    for sparsity, order, size in itertools.product(SPARSITIES, orders, BLOCK_SIZES):
        if (order, size) == reference:
            continue
        mine, other = (
            [
                row.error
                for row in rows
                if (row.sparsity, row.order, row.block_size) == (sparsity, *each)
                and not row.neighbours
                and not row.top_p
            ]
            for each in ((order, size), reference)
        )
        apart = interval([a - b for a, b in zip(mine, other, strict=True)], "+")
        lines.append(f"{sparsity:.0%}: {order} {size} against {reference[0]} {reference[1]}: {apart}")
    return "\n".join(lines)


def interval(values: list[float], sign: str = "") -> str:
    found = bootstrap(values)
    if math.isnan(found.low):
        return f"{found.mean:{sign}.3f}"
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def main(
    prompts: int = 6,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    order: Annotated[list[str] | None, typer.Option(show_default=" ".join(ORDERS))] = None,
    layer: Annotated[list[int] | None, typer.Option(show_default="1 4")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Denoising steps of 12.", show_default="3 9")] = None,
    rectify: str = SparseConfig().rectify,
    out: Path = Path("runs/blocking"),
) -> None:
    start = time.perf_counter()
    pipe = load_demo_pipeline("cpu")
    run = Settings(height=size, width=size, num_frames=16, steps=STEPS)
    layers, steps, orders = tuple(layer or (1, 4)), tuple(step or (3, 9)), order or list(ORDERS)
    settings = settings_of(orders)
    rows: list[Row] = []
    made_on = machine(torch.device("cpu"), shlex.join(["python", *sys.argv]))
    with Progress() as progress:
        task = progress.add_task("attention calls", total=prompts * len(steps) * len(layers))
        for prompt in PROMPTS[:prompts]:
            pair = Pair(prompt=prompt, seed=0)
            rows += rows_of(pipe, pair, run, layers, steps, settings, rectify, lambda: progress.advance(task))
            write_csv(out / f"blocking-{size}.csv", rows, made_on)  # a run that is stopped leaves what it measured
    print(
        f"\n{prompts} prompts, seed 0, {size} pixels, layers {layers}, steps {steps} of {STEPS}, rectify {rectify!r}; ",
        end="",
    )
    print(f"{made_on.device}, torch {made_on.torch}, {time.perf_counter() - start:.0f} s; {made_on.command}")
    print("mean [95% interval of the mean, percentile bootstrap over the prompts]\n")
    print(table(rows, settings), "\n")
    print(against(rows, orders, ("gilbert", 64)))


if __name__ == "__main__":
    typer.run(main)
