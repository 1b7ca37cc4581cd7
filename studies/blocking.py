"""What order, block size, neighbours and top-p are worth, on attention inputs of the demo model.

    python benchmarks/blocking.py [--prompts 6] [--size 64] [--rectify ipar+gapr] [--out runs/blocking]

Attention calls of full-attention runs, two layers at two steps, seed 0. Neighbours and top-p keep more blocks than
the sparsity asks for, so each is also compared with as many blocks chosen by P alone ("equal pairs"). Writes
blocking-SIZE.csv, one line a prompt and setting (means over layers and steps), and prints a Markdown table: mean [95%
interval over the prompts].
"""

import itertools
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
from rectified_spaattn.attention import density
from rectified_spaattn.benchmark.record import Machine, machine, read_csv, write_csv
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


def table(rows: list[Row]) -> str:
    """One line a sparsity, order and block size: chosen by P alone, with neighbours as well, with top-p as well."""
    lines = [
        "| sparsity | order | block | pairs | captured mass | error | neighbours: pairs | error | gap at equal pairs "
        "| top-p: pairs | error | gap at equal pairs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity, order, size in cuts(rows):
        plain = of(rows, sparsity, order, size)
        cells = [f"{sparsity:.0%}", order, str(size), f"{fmean(row.density for row in plain):.1%}"]
        cells += [interval([row.captured for row in plain]), interval([row.error for row in plain])]
        for neighbours, top_p in ((True, 0.0), (False, TOP_P)):
            more = of(rows, sparsity, order, size, neighbours, top_p)
            cells += [f"{fmean(row.density for row in more):.1%}", interval([row.error for row in more])]
            cells += [interval([row.error - row.equal_error for row in more], "+")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(rows: list[Row], reference: tuple[str, int]) -> str:
    """Orders and block sizes without neighbours and top-p: the error less that of one of them, prompt by prompt."""
    lines = []
    for sparsity, order, size in cuts(rows):
        if (order, size) == reference:
            continue
        pairs = zip(of(rows, sparsity, order, size), of(rows, sparsity, *reference), strict=True)
        apart = interval([mine.error - other.error for mine, other in pairs], "+")
        lines.append(f"{sparsity:.0%}: {order} {size} less {reference[0]} {reference[1]}: {apart}")
    return "\n".join(lines)


def cuts(rows: list[Row]) -> list[tuple[float, str, int]]:
    places = dict.fromkeys((row.sparsity, row.order, row.block_size) for row in rows)
    return sorted(places, key=lambda place: place[0])


def of(
    rows: list[Row], sparsity: float, order: str, size: int, neighbours: bool = False, top_p: float = 0.0
) -> list[Row]:
    wanted = Setting(sparsity=sparsity, order=order, block_size=size, neighbours=neighbours, top_p=top_p)
    return [row for row in rows if all(getattr(row, name) == value for name, value in vars(wanted).items())]


def show(rows: list[Row], made_on: Machine) -> None:
    print(f"\n{len({row.prompt for row in rows})} prompts, seed 0, rectify {rows[0].rectify!r}; ", end="")
    print(f"{made_on.device}, torch {made_on.torch}; {made_on.command}")
    print("mean [95% interval of the mean, percentile bootstrap over the prompts]\n")
    print(table(rows), "\n")
    print(against(rows, ("gilbert", 64)))


def interval(values: list[float], sign: str = "") -> str:
    return bootstrap(values).text(3, sign)


def main(
    prompts: int = 6,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    order: Annotated[list[str] | None, typer.Option(show_default=" ".join(ORDERS))] = None,
    layer: Annotated[list[int] | None, typer.Option(show_default="1 4")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Denoising steps of 12.", show_default="3 9")] = None,
    rectify: str = "ipar+gapr",
    out: Path = Path("runs/blocking"),
    table_of: Annotated[Path | None, typer.Option(help="Print the table of an earlier run; measure nothing.")] = None,
) -> None:
    if table_of is not None:
        show(*read_csv(table_of, Row))
        return
    pipe = load_demo_pipeline("cpu")
    run = Settings(height=size, width=size, num_frames=16, steps=STEPS)
    layers, steps, settings = tuple(layer or (1, 4)), tuple(step or (3, 9)), settings_of(order or list(ORDERS))
    rows: list[Row] = []
    made_on = machine(torch.device("cpu"), shlex.join(["python", *sys.argv]))
    with Progress() as progress:
        task = progress.add_task("attention calls", total=prompts * len(steps) * len(layers))
        for prompt in PROMPTS[:prompts]:
            pair = Pair(prompt=prompt, seed=0)
            rows += rows_of(pipe, pair, run, layers, steps, settings, rectify, lambda: progress.advance(task))
            write_csv(out / f"blocking-{size}.csv", rows, made_on)  # a run that is stopped leaves what it measured
    show(rows, made_on)


if __name__ == "__main__":
    typer.run(main)
