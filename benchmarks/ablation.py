"""Every `rectify` mode at several sparsities on the demo model: single attention calls and whole clips against full
attention, on fixed prompt-seed pairs.

    python benchmarks/ablation.py run --split dev [--batch 24] [--out runs/ablation]
    torchrun --nproc-per-node 4 benchmarks/ablation.py run ...      # the pairs shared out; one GPU is enough
    python benchmarks/ablation.py table runs/ablation/dev.csv

`run` writes SPLIT.csv (one row a pair, sparsity and mode) and SPLIT-layers.csv, and prints what `table` prints: means
with 95% bootstrap intervals over the pairs, as Markdown. The pairs of "held-out" are for one look, after everything has
been chosen on "dev".
"""

import csv
import itertools
import math
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, get_type_hints

import torch
import typer
from accelerate.utils import gather_object
from rich.progress import Progress

from rectified_spaattn import SparseConfig
from rectified_spaattn.benchmark.record import Machine, machine, write_csv
from rectified_spaattn.config import RECTIFY_MODES
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import split_pairs
from rectified_spaattn.evaluation.allocation import allocation, exact
from rectified_spaattn.evaluation.capture import capture_attention, end_after
from rectified_spaattn.evaluation.intervals import Interval, bootstrap
from rectified_spaattn.evaluation.paired import Mode, Pair, Settings, full_mode, generate_batch, warm_up
from rectified_spaattn.evaluation.processes import device_of, processes
from rectified_spaattn.evaluation.scores import score

FRAMES = 16
FLOOR = "full attention, math kernel"
HIGHER_IS_BETTER = ("psnr", "ssim")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair under one mode. The attention columns are means over all layers and the captured steps."""

    split: str
    prompt: str
    seed: int
    sparsity: float
    rectify: str
    backend: str
    density: float
    attention_error: float
    mass_error: float
    block_mass_error: float
    kept_mass: float
    psnr: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer at one step, means over the pairs."""

    split: str
    sparsity: float
    rectify: str
    step: int
    layer: int
    attention_error: float
    mass_error: float
    block_mass_error: float
    kept_mass: float


ATTENTION = ("attention_error", "mass_error", "block_mass_error", "kept_mass")
Place = tuple[Pair, float, str]  # pair, sparsity, rectify
Calls = dict[Place, dict[tuple[int, int], tuple[float, ...]]]  # (step, layer) -> ATTENTION


def study_calls(pipe, pairs, settings, configs, backend, advance) -> Calls:
    """All layers at three steps of full-attention runs, each call under every config."""
    found: Calls = defaultdict(dict)
    for step in (settings.steps // 4, settings.steps // 2, settings.steps * 3 // 4):
        with capture_attention(pipe, step=step, device=pipe.device) as calls:
            generate_batch(pipe, full_mode(), pairs, settings, after_step=end_after(step))
        for call in calls:
            full = exact(call, configs[0].block_size, configs[0].order)
            for config in configs:
                got = allocation(full, config, backend=backend)
                values = (got.relative_error, got.mass_error, got.block_mass_error, got.kept_mass)
                for pair, of_pair in zip(pairs, zip(*(each.tolist() for each in values), strict=True), strict=True):
                    found[pair, config.sparsity, config.rectify][step, call.layer] = of_pair
        advance()
    return found


def clip_scores(pipe, pairs, settings, modes, backend, advance):
    """[(mode, Score)] of every pair under every mode but the reference."""
    clips = []
    for mode in modes:
        clips += generate_batch(pipe, mode, pairs, settings, backend=backend)
        advance()
    return [(clip.mode, each) for clip, each in zip(clips, score(clips), strict=True) if clip.mode.name != "full"]


def rows_of(split: str, calls: Calls, scores) -> list[Row]:
    rows = []
    for mode, each in scores:
        sparsity, rectify = (mode.config.sparsity, mode.config.rectify) if mode.config else (0.0, FLOOR)
        of_pair = calls.get((Pair(prompt=each.prompt, seed=each.seed), sparsity, rectify), {}).values()
        means = [fmean(column) for column in zip(*of_pair, strict=True)] or [math.nan] * len(ATTENTION)
        rows.append(
            Row(
                split=split,
                prompt=each.prompt,
                seed=each.seed,
                sparsity=sparsity,
                rectify=rectify,
                backend=each.backend,
                density=each.density,
                psnr=each.psnr,
                ssim=each.ssim,
                **dict(zip(ATTENTION, means, strict=True)),
            )
        )
    return rows


def layer_rows(split: str, calls: Calls) -> list[LayerRow]:
    by_place = defaultdict(list)
    for (_, sparsity, rectify), of_pair in calls.items():
        for (step, layer), values in of_pair.items():
            by_place[sparsity, rectify, step, layer].append(values)
    return [
        LayerRow(
            split=split,
            sparsity=sparsity,
            rectify=rectify,
            step=step,
            layer=layer,
            **{name: fmean(column) for name, column in zip(ATTENTION, zip(*values, strict=True), strict=True)},
        )
        for (sparsity, rectify, step, layer), values in by_place.items()
    ]


def table(rows: list[Row]) -> str:
    """Markdown: one line a sparsity and mode; mean [95% interval], and the gain over "none" pair by pair."""
    lines = [
        "| sparsity | rectify | computed pairs | attention error | mass error | of block means | PSNR, dB | SSIM "
        "| PSNR over none, dB | SSIM over none | PSNR won |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity, rectify in dict.fromkeys((row.sparsity, row.rectify) for row in rows):
        mine = by_pair(rows, sparsity, rectify)
        plain = by_pair(rows, sparsity, "none")
        cells = [f"{fmean(row.density for row in mine.values()):.1%}"]
        cells += [cell([getattr(row, name) for row in mine.values()], 3) for name in ATTENTION[:3]]
        cells += [cell([row.psnr for row in mine.values()], 2), cell([row.ssim for row in mine.values()], 3)]
        if rectify in ("none", FLOOR) or not plain:
            cells += ["", "", ""]
        else:
            gains = {
                name: [getattr(mine[k], name) - getattr(plain[k], name) for k in mine] for name in ("psnr", "ssim")
            }
            won = sum(gain > 0 for gain in gains["psnr"])
            cells += [cell(gains["psnr"], 2, "+"), cell(gains["ssim"], 3, "+"), f"{won} of {len(mine)}"]
        lines.append(f"| {sparsity:.0%} | {rectify} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def orders(rows: list[Row]) -> str:
    """Per sparsity, the modes from worst to best; "<" where the interval of the paired difference excludes 0."""
    lines = []
    sparsities = sorted({row.sparsity for row in rows} - {0.0})
    for sparsity, name in itertools.product(sparsities, (*ATTENTION[:2], *HIGHER_IS_BETTER)):
        modes = {}
        for rectify in dict.fromkeys(row.rectify for row in rows if row.sparsity == sparsity):
            modes[rectify] = [getattr(row, name) for row in by_pair(rows, sparsity, rectify).values()]
        sign = 1 if name in HIGHER_IS_BETTER else -1
        ranked = sorted(modes, key=lambda mode: sign * fmean(modes[mode]))
        words = [ranked[0]]
        for worse, better in itertools.pairwise(ranked):
            gain = bootstrap([sign * (b - a) for a, b in zip(modes[worse], modes[better], strict=True)])
            words += ["<" if gain.low > 0 else "~", better]
        lines.append(f"{sparsity:.0%} {name.replace('_', ' ')}: {' '.join(words)}")
    return "\n".join(lines)


def by_pair(rows: list[Row], sparsity: float, rectify: str) -> dict[tuple[str, int], Row]:
    return {(row.prompt, row.seed): row for row in rows if (row.sparsity, row.rectify) == (sparsity, rectify)}


def cell(values: list[float], digits: int, sign: str = "") -> str:
    found: Interval = bootstrap(values)
    if math.isnan(found.mean):
        return ""
    if math.isnan(found.low):
        return f"{found.mean:{sign}.{digits}f}"
    return f"{found.mean:{sign}.{digits}f} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"


def show(rows: list[Row], made_on: Machine) -> None:
    pairs = len({(row.prompt, row.seed) for row in rows})
    print(f"\n{rows[0].split}: {pairs} prompt-seed pairs; {made_on.device}, torch {made_on.torch}; {made_on.command}")
    print("mean [95% interval of the mean, percentile bootstrap over the pairs]\n")
    print(table(rows), "\n")
    print("worst to best; < where the interval of the paired difference excludes 0, ~ where not")
    print(orders(rows))


def read(path: Path) -> tuple[list[Row], Machine]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    hints = get_type_hints(Row)
    rows = [Row(**{name: hint(line[name]) for name, hint in hints.items()}) for line in lines]
    return rows, Machine(**{field.name: lines[0][field.name] for field in fields(Machine)})


@app.command("table")
def print_table(path: Annotated[list[Path], typer.Argument(help="CSV files that `run` wrote.")]) -> None:
    """Print the Markdown tables of earlier runs."""
    for each in path:
        show(*read(each))


@app.command()
def run(
    split: Annotated[str, typer.Option(help="dev or held-out.")],
    sparsity: Annotated[list[float] | None, typer.Option(show_default="0.7 0.8 0.9 0.95")] = None,
    rectify: Annotated[list[str] | None, typer.Option(show_default=" ".join(RECTIFY_MODES))] = None,
    block_size: int = 64,
    order: str = "gilbert",
    top_p: float = 0.0,
    neighbours: bool = False,
    size: int = 64,
    steps: int = 12,
    pairs: Annotated[int | None, typer.Option(help="Only the first so many, to try things out.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts in one call of the pipeline.")] = 8,
    device: str = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: str = "auto",
    out: Path = Path("runs/ablation"),
) -> None:
    """Measure one split."""
    start = time.perf_counter()
    state = processes()
    pipe = load_demo_pipeline(device_of(device, state), getattr(torch, dtype))
    base = {"block_size": block_size, "order": order, "top_p": top_p, "neighbours": neighbours}
    configs = [
        SparseConfig(sparsity=each, rectify=mode, **base)
        for each, mode in itertools.product(sparsity or (0.7, 0.8, 0.9, 0.95), rectify or RECTIFY_MODES)
    ]
    floor = Mode(name="floor", label=FLOOR, config=None, kernel="math")
    modes = [full_mode(), floor]
    modes += [Mode(name=f"{c.rectify}-{c.sparsity:g}", label=c.rectify, config=c) for c in configs]
    everything = [Pair(prompt=prompt, seed=seed) for prompt, seed in split_pairs(split)][:pairs]
    settings = Settings(height=size, width=size, num_frames=FRAMES, steps=steps)
    with state.split_between_processes(everything) as mine, Progress(disable=not state.is_main_process) as progress:
        calls: Calls = {}
        scores = []
        if mine:
            warm_up(pipe, modes, mine[0], settings, backend=backend)
        batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        study = progress.add_task("attention calls", total=3 * len(batches))
        clips = progress.add_task("clips", total=len(modes) * len(batches))
        for some in batches:
            calls |= study_calls(pipe, some, settings, configs, backend, lambda: progress.advance(study))
            scores += clip_scores(pipe, some, settings, modes, backend, lambda: progress.advance(clips))
    gathered = gather_object([(calls, scores)]) if state.num_processes > 1 else [(calls, scores)]
    if not state.is_main_process:
        return
    calls = {place: of_pair for part, _ in gathered for place, of_pair in part.items()}
    found = rows_of(split, calls, [each for _, part in gathered for each in part])
    ranks = [(0.0, FLOOR), *((config.sparsity, config.rectify) for config in configs)]
    found.sort(key=lambda row: ranks.index((row.sparsity, row.rectify)))
    made_on = machine(pipe.device, shlex.join(["python", *sys.argv]))
    write_csv(out / f"{split}.csv", found, made_on)
    write_csv(out / f"{split}-layers.csv", layer_rows(split, calls), made_on)
    show(found, made_on)
    print(f"\n{time.perf_counter() - start:.0f} s in {state.num_processes} process(es); {out / f'{split}.csv'}")


if __name__ == "__main__":
    app()
