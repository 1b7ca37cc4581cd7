"""Every `rectify` mode at several sparsities and orders on the demo model: single attention calls and whole clips
against full attention, on fixed prompt-seed pairs.

    python benchmarks/ablation.py run --split dev [--batch 24] [--out runs/ablation]
    torchrun --nproc-per-node 4 benchmarks/ablation.py run ...      # the pairs shared out; one GPU is enough
    python benchmarks/ablation.py table runs/ablation/dev.csv [more.csv ...] [--plot ablation.png]

`run` writes SPLIT.csv (one row a pair, sparsity, mode and order) and SPLIT-layers.csv, and prints what `table` prints:
means with 95% bootstrap intervals over the pairs, as Markdown. The pairs of "held-out" are for one look, after
everything has been chosen on "dev".
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
from matplotlib.figure import Figure
from rich.progress import Progress

from rectified_spaattn import SparseConfig
from rectified_spaattn.benchmark.record import Machine, machine, write_csv
from rectified_spaattn.config import RECTIFY_MODES
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import split_pairs
from rectified_spaattn.device import device_of
from rectified_spaattn.evaluation.allocation import allocation, exact
from rectified_spaattn.evaluation.capture import capture_attention, end_after
from rectified_spaattn.evaluation.intervals import Interval, bootstrap
from rectified_spaattn.evaluation.paired import Mode, Pair, Settings, full_mode, generate_batch, warm_up
from rectified_spaattn.evaluation.processes import processes
from rectified_spaattn.evaluation.scores import score
from rectified_spaattn.report.figures import MODE_COLOURS, PALETTE

FRAMES = 16
FLOOR = "full attention, math kernel"
FLOOR_SETTING = (0.0, FLOOR, "")
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
    order: str
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
    order: str
    step: int
    layer: int
    attention_error: float
    mass_error: float
    block_mass_error: float
    kept_mass: float


ATTENTION = ("attention_error", "mass_error", "block_mass_error", "kept_mass")
Setting = tuple[float, str, str]  # sparsity, rectify, order
Place = tuple[Pair, float, str, str]  # pair and setting
Calls = dict[Place, dict[tuple[int, int], tuple[float, ...]]]  # (step, layer) -> ATTENTION


def study_calls(pipe, pairs, settings, configs, backend, advance) -> Calls:
    """All layers at three steps of full-attention runs, each call under every config."""
    found: Calls = defaultdict(dict)
    for step in (settings.steps // 4, settings.steps // 2, settings.steps * 3 // 4):
        with capture_attention(pipe, step=step, device=pipe.device) as calls:
            generate_batch(pipe, full_mode(), pairs, settings, after_step=end_after(step))
        for call in calls:
            full = {order: exact(call, configs[0].block_size, order) for order in {each.order for each in configs}}
            for config in configs:
                got = allocation(full[config.order], config, backend=backend)
                values = (got.relative_error, got.mass_error, got.block_mass_error, got.kept_mass)
                for pair, of_pair in zip(pairs, zip(*(each.tolist() for each in values), strict=True), strict=True):
                    found[pair, *setting_of(config)][step, call.layer] = of_pair
        advance()
    return found


def setting_of(of: SparseConfig | Row) -> Setting:
    return of.sparsity, of.rectify, of.order


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
        sparsity, rectify, order = setting_of(mode.config) if mode.config else FLOOR_SETTING
        of_pair = calls.get((Pair(prompt=each.prompt, seed=each.seed), sparsity, rectify, order), {}).values()
        means = [fmean(column) for column in zip(*of_pair, strict=True)] or [math.nan] * len(ATTENTION)
        rows.append(
            Row(
                split=split,
                prompt=each.prompt,
                seed=each.seed,
                sparsity=sparsity,
                rectify=rectify,
                order=order,
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
    for (_, *setting), of_pair in calls.items():
        for (step, layer), values in of_pair.items():
            by_place[*setting, step, layer].append(values)
    return [
        LayerRow(
            split=split,
            sparsity=sparsity,
            rectify=rectify,
            order=order,
            step=step,
            layer=layer,
            **{name: fmean(column) for name, column in zip(ATTENTION, zip(*values, strict=True), strict=True)},
        )
        for (sparsity, rectify, order, step, layer), values in by_place.items()
    ]


def table(rows: list[Row]) -> str:
    """Markdown: one line a setting; mean [95% interval], and the gain, pair by pair, over "none" in the first order."""
    lines = [
        "| sparsity | rectify | order | computed pairs | attention error | mass error | of block means | PSNR, dB "
        "| SSIM | PSNR over none, dB | SSIM over none | PSNR won |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first_order = next((row.order for row in rows if row.order), "")
    for setting in settings_of(rows):
        sparsity, rectify, order = setting
        mine = by_pair(rows, setting)
        plain = by_pair(rows, (sparsity, "none", first_order))
        cells = [f"{fmean(row.density for row in mine.values()):.1%}"]
        cells += [cell([getattr(row, name) for row in mine.values()], 3) for name in ATTENTION[:3]]
        cells += [cell([row.psnr for row in mine.values()], 2), cell([row.ssim for row in mine.values()], 3)]
        if setting in ((sparsity, "none", first_order), FLOOR_SETTING) or not plain:
            cells += ["", "", ""]
        else:
            gains = {
                name: [getattr(mine[k], name) - getattr(plain[k], name) for k in mine] for name in ("psnr", "ssim")
            }
            won = sum(gain > 0 for gain in gains["psnr"])
            cells += [cell(gains["psnr"], 2, "+"), cell(gains["ssim"], 3, "+"), f"{won} of {len(mine)}"]
        lines.append(f"| {sparsity:.0%} | {rectify} | {order} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def orders(rows: list[Row]) -> str:
    """Per sparsity, the modes from worst to best; "<" where the interval of the paired difference excludes 0."""
    lines = []
    sparsities = sorted({row.sparsity for row in rows} - {0.0})
    for sparsity, name in itertools.product(sparsities, (*ATTENTION[:2], *HIGHER_IS_BETTER)):
        modes = {}
        for setting in settings_of(rows):
            if setting[0] == sparsity:
                modes[label_of(setting, rows)] = [getattr(row, name) for row in by_pair(rows, setting).values()]
        sign = 1 if name in HIGHER_IS_BETTER else -1
        ranked = sorted(modes, key=lambda mode: sign * fmean(modes[mode]))
        words = [ranked[0]]
        for worse, better in itertools.pairwise(ranked):
            gain = bootstrap([sign * (b - a) for a, b in zip(modes[worse], modes[better], strict=True)])
            words += ["<" if gain.low > 0 else "~", better]
        lines.append(f"{sparsity:.0%} {name.replace('_', ' ')}: {' '.join(words)}")
    return "\n".join(lines)


def by_pair(rows: list[Row], setting: Setting) -> dict[tuple[str, int], Row]:
    return {(row.prompt, row.seed): row for row in rows if setting_of(row) == setting}


def settings_of(rows: list[Row]) -> list[Setting]:
    return list(dict.fromkeys(map(setting_of, rows)))


def label_of(setting: Setting, rows: list[Row]) -> str:
    """The mode, and the order where there are several."""
    several = len({row.order for row in rows} - {""}) > 1
    return f"{setting[1]}, {setting[2]}" if several else setting[1]


def cell(values: list[float], digits: int, sign: str = "") -> str:
    found: Interval = bootstrap(values)
    return "" if math.isnan(found.mean) else found.text(digits, sign)


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


def read_all(paths: list[Path]) -> tuple[list[Row], Machine]:
    """The rows of all files by rising sparsity, of a pair and setting the first one found; the first file's machine."""
    read_in = [read(path) for path in paths]
    found: dict[tuple[str, int, Setting], Row] = {}
    for row in (row for rows, _ in read_in for row in rows):
        found.setdefault((row.prompt, row.seed, setting_of(row)), row)
    return sorted(found.values(), key=lambda row: row.sparsity), read_in[0][1]


def plot(rows: list[Row], made_on: Machine, path: Path) -> None:
    """Attention error, mass error, PSNR and SSIM against sparsity, one line a mode, with the intervals of `table`."""
    titles = {
        "attention_error": "output error of an attention call (lower is better)",
        "mass_error": "mass error (lower is better)",
        "psnr": "PSNR to full attention, dB (higher is closer)",
        "ssim": "SSIM to full attention (higher is closer)",
    }
    sparsities = sorted({row.sparsity for row in rows} - {0.0})
    modes = list(dict.fromkeys(setting[1:] for setting in settings_of(rows) if setting != FLOOR_SETTING))
    spare = itertools.cycle(colour for colour in PALETTE if colour not in MODE_COLOURS.values())
    colours = {rectify: MODE_COLOURS.get(rectify) or next(spare) for rectify, _ in modes}
    styles = dict(zip(dict.fromkeys(order for _, order in modes), ("-", "--", ":", "-."), strict=False))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        for place, mode in enumerate(modes):
            found = [bootstrap([getattr(row, name) for row in by_pair(rows, (s, *mode)).values()]) for s in sparsities]
            aside = 1.75 / len(modes) * (place - (len(modes) - 1) / 2)  # bars do not hide one another
            x = [100 * s + aside for s in sparsities]
            bars = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
            y = [each.mean for each in found]
            axis.errorbar(
                x, y, yerr=bars, color=colours[mode[0]], linestyle=styles[mode[1]], marker="o", markersize=4, capsize=3,
                label=label_of((0.0, *mode), rows),
            )  # fmt: skip
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xticks([100 * s for s in sparsities], [f"{s:.0%}" for s in sparsities])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(modes), 5), frameon=False
    )
    pairs = len({(row.prompt, row.seed) for row in rows})
    figure.suptitle(f"{rows[0].split}: {pairs} prompt-seed pairs, 95% intervals; {made_on.device}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@app.command("table")
def print_table(
    paths: Annotated[list[Path], typer.Argument(help="CSV files that `run` wrote; settings in several count once.")],
    plot_to: Annotated[Path | None, typer.Option("--plot", help="PNG file for the figure.")] = None,
) -> None:
    """Print the Markdown tables of earlier runs."""
    rows, made_on = read_all(paths)
    show(rows, made_on)
    if plot_to is not None:
        plot(rows, made_on, plot_to)


@app.command()
def run(
    split: Annotated[str, typer.Option(help="dev or held-out.")],
    sparsity: Annotated[list[float] | None, typer.Option(show_default="0.7 0.8 0.9 0.95")] = None,
    rectify: Annotated[list[str] | None, typer.Option(show_default=" ".join(RECTIFY_MODES))] = None,
    block_size: int = 64,
    order: Annotated[list[str] | None, typer.Option(show_default="gilbert")] = None,
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
    pipe = load_demo_pipeline(device_of(device, state.local_process_index), getattr(torch, dtype))
    base = {"block_size": block_size, "top_p": top_p, "neighbours": neighbours}
    configs = [
        SparseConfig(sparsity=each, rectify=mode, order=curve, **base)
        for each, curve, mode in itertools.product(
            sparsity or (0.7, 0.8, 0.9, 0.95), order or ("gilbert",), rectify or RECTIFY_MODES
        )
    ]
    floor = Mode(name="floor", label=FLOOR, config=None, kernel="math")
    modes = [full_mode(), floor]
    modes += [Mode(name=f"{c.rectify}-{c.order}-{c.sparsity:g}", label=c.rectify, config=c) for c in configs]
    everything = [Pair(prompt=prompt, seed=seed) for prompt, seed in split_pairs(split)][:pairs]
    settings = Settings(height=size, width=size, num_frames=FRAMES, steps=steps)
    made_on = machine(pipe.device, shlex.join(["python", *sys.argv]))
    ranks = [FLOOR_SETTING, *(setting_of(config) for config in configs)]

    def save(calls: Calls, scores) -> list[Row]:
        found = rows_of(split, calls, scores)
        found.sort(key=lambda row: ranks.index(setting_of(row)))
        write_csv(out / f"{split}.csv", found, made_on)
        write_csv(out / f"{split}-layers.csv", layer_rows(split, calls), made_on)
        return found

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
            if state.num_processes == 1:  # a run that is stopped leaves the batches it finished
                save(calls, scores)
    gathered = gather_object([(calls, scores)]) if state.num_processes > 1 else [(calls, scores)]
    if not state.is_main_process:
        return
    calls = {place: of_pair for part, _ in gathered for place, of_pair in part.items()}
    found = save(calls, [each for _, part in gathered for each in part])
    show(found, made_on)
    print(f"\n{time.perf_counter() - start:.0f} s in {state.num_processes} process(es); {out / f'{split}.csv'}")


if __name__ == "__main__":
    app()
