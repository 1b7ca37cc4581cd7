"""How well critical blocks are chosen on the demo model's attention: recall, captured mass and the error that follows.

    python benchmarks/selection.py [--prompts 8] [--out runs/selection]

Attention calls of full-attention runs, all layers at two steps, batch 1, seed 0; every selector of
`evaluation/selection.py` keeps exactly as many blocks as the sparsity says. Writes selection.csv, one line a prompt,
selector and sparsity (means over layers and steps), and prints a Markdown table: mean [95% interval over the prompts].
"""

import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from rectified_spaattn import SparseConfig
from rectified_spaattn.benchmark.record import Machine, machine, read_csv, write_csv
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.capture import capture_calls
from rectified_spaattn.evaluation.intervals import bootstrap
from rectified_spaattn.evaluation.paired import Pair, Settings
from rectified_spaattn.evaluation.selection import IN_USE, study_selection

STEPS = 12
MEASURES = ("recall", "captured", "plain", "rectified")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means over the calls of one prompt; see evaluation.selection.SelectionRow for what is measured."""

    prompt: str
    seed: int
    selector: str
    sparsity: float
    rectify: str
    recall: float
    captured: float
    plain: float
    rectified: float


def rows_of(
    pipe, pair: Pair, settings: Settings, steps: tuple[int, ...], config: SparseConfig, sparsities
) -> list[Row]:
    found = defaultdict(list)
    for step in steps:
        for call in capture_calls(pipe, pair, settings, step=step):
            for row in study_selection(call, config, sparsities):
                found[row.selector, row.sparsity].append([getattr(row, name) for name in MEASURES])
    return [
        Row(
            prompt=pair.prompt,
            seed=pair.seed,
            selector=selector,
            sparsity=sparsity,
            rectify=config.rectify,
            **dict(zip(MEASURES, map(fmean, zip(*values, strict=True)), strict=True)),
        )
        for (selector, sparsity), values in found.items()
    ]


def table(rows: list[Row]) -> str:
    lines = [
        f"| sparsity | blocks by | recall | captured mass | error, none | error, {rows[0].rectify} | less that of P |",
        "|---|---|---|---|---|---|---|",
    ]
    for sparsity, selector in sorted({(row.sparsity, row.selector): None for row in rows}, key=lambda key: key[0]):
        mine = [row for row in rows if (row.sparsity, row.selector) == (sparsity, selector)]
        in_use = [row for row in rows if (row.sparsity, row.selector) == (sparsity, IN_USE)]
        cells = [cell([getattr(row, name) for row in mine]) for name in MEASURES]
        gaps = [row.rectified - other.rectified for row, other in zip(mine, in_use, strict=True)]
        cells.append("" if selector == IN_USE else cell(gaps, "+"))
        lines.append(f"| {sparsity:.0%} | {selector} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(rows: list[Row], made_on: Machine) -> None:
    prompts = len({row.prompt for row in rows})
    print(f"\n{prompts} prompts, seed 0; {made_on.device}, torch {made_on.torch}; {made_on.command}")
    print("mean [95% interval of the mean, percentile bootstrap over the prompts]\n")
    print(table(rows))


def cell(values: list[float], sign: str = "") -> str:
    """Mean [95% interval]."""
    return bootstrap(values).text(3, sign)


def main(
    prompts: int = 8,
    sparsity: Annotated[list[float] | None, typer.Option(show_default="0.8 0.9")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Denoising steps of 12.", show_default="3 9")] = None,
    block_size: int = 64,
    order: str = "gilbert",
    rectify: str = "ipar+gapr",
    out: Path = Path("runs/selection"),
    table_of: Annotated[Path | None, typer.Option(help="Print the table of an earlier run; measure nothing.")] = None,
) -> None:
    if table_of is not None:
        show(*read_csv(table_of, Row))
        return
    pipe = load_demo_pipeline("cpu")
    settings = Settings(height=64, width=64, num_frames=16, steps=STEPS)
    config = SparseConfig(block_size=block_size, order=order, rectify=rectify, neighbours=False, top_p=0.0)
    rows: list[Row] = []
    made_on = machine(torch.device("cpu"), shlex.join(["python", *sys.argv]))
    with Progress() as progress:
        for prompt in progress.track(PROMPTS[:prompts], description="prompts"):
            pair = Pair(prompt=prompt, seed=0)
            rows += rows_of(pipe, pair, settings, tuple(step or (3, 9)), config, sparsity or [0.8, 0.9])
            write_csv(out / "selection.csv", rows, made_on)  # a run that is stopped leaves what it measured
    show(rows, made_on)


if __name__ == "__main__":
    typer.run(main)
