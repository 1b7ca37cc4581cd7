"""What `rectified-spaattn inspect` does: load, capture, study, draw, write."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..benchmark.op import Watch
from ..benchmark.record import machine, write_csv
from ..config import RECTIFY_MODES, SparseConfig
from ..device import device_of
from ..evaluation import record
from ..evaluation.capture import AttentionCall, capture_calls
from ..evaluation.maps import HeadResult, HeadStudy, one_head, study_head
from ..evaluation.paired import Pair, Settings
from ..evaluation.selection import SELECTORS, SelectionRow, study_selection
from ..pipelines.adapters import adapter_for
from ..report.figures import CallName
from ..report.html import percent, write_inspection
from ..report.maps import maps_figure
from .console import print_wide, progress
from .evaluate_pipeline import DEMO, base_configs, call_settings, given_settings, load_pipeline
from .inspect import InspectOptions


class InspectError(RuntimeError):
    """What was asked for cannot be had from this model. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A line of results.csv; see evaluation.maps.HeadResult for what the numbers are."""

    layer: int
    head: int
    step: int
    sparsity: float
    rectify: str
    relative_error: float
    density: float
    kept_mass: float
    mass_error: float
    r_error: float
    misplaced: float
    compensated: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Studied:
    """What was measured of one head; captured: the call with all heads. selection: empty where not asked for."""

    captured: AttentionCall
    name: CallName
    study: HeadStudy
    selection: list[SelectionRow]


def run(options: InspectOptions, console: Console | None = None) -> Path:
    """The whole command. Returns the path of inspect.html.

    Raises InspectError where the model cannot be loaded, has no adapter, or has no such layer, head or step.
    """
    console = Console() if console is None else console
    device = device_of(options.device)
    pipe = _load(options, device)
    environment = record.environment(device)
    settings = _settings(pipe, options)
    layer, step = _place(pipe, options, settings)
    config = options.config(base_configs(pipe, options.sparsity)[0])
    with progress(console) as watch:
        found = _study(pipe, options, config, settings, layer, step, device, watch)
        figures = _draw(options, found)
    rows = [_row(found.name, result) for result in found.study.results]
    _write_tables(options, rows, found.selection, device)
    told = {
        "command": options.command,
        **environment,
        "model": "the demo model" if options.model == DEMO else options.model,
        "prompt": options.prompt,
        "seed": options.seed,
        "settings": asdict(settings),
        "config": config.to_dict(),
        "call": _call_record(found),
        "results": [asdict(row) for row in rows],
        "selection": [asdict(row) for row in found.selection],
    }
    (options.out / "inspect.json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")
    page = options.out / "inspect.html"
    write_inspection(page, told, figures)
    print_wide(console, results_table(rows, f"{found.name} of {told['model']}"))
    if found.selection:
        print_wide(console, selection_table(found.selection, options.rectify))
    console.print(f"Page: {page.resolve()}", soft_wrap=True)
    return page


def _study(
    pipe: Any,
    options: InspectOptions,
    config: SparseConfig,
    settings: Settings,
    layer: int,
    step: int,
    device: torch.device,
    watch: Watch,
) -> Studied:
    """Generate up to the step with full attention, take the layer's call, and measure one head of it."""
    work = step + 1 + 2 + len(options.sparsity) * len(RECTIFY_MODES) + options.selection * (len(SELECTORS) + 1)
    count = itertools.count(1)

    def advance(what: str) -> None:
        watch(what, next(count), work)

    pair = Pair(prompt=options.prompt, seed=options.seed)
    try:
        captured = capture_calls(
            pipe, pair, settings, step=step, layers=[layer], on_step=lambda done: advance(f"denoising step {done}")
        )[0]
        head = captured.q.shape[2] // 2 if options.head is None else options.head
        call = one_head(captured, head, device)
        study = study_head(call, config, options.sparsity, on_result=advance)
    except ValueError as error:
        raise InspectError(str(error)) from error
    selection = study_selection(call, config, options.sparsity, advance) if options.selection else []
    name = CallName(layer=layer, head=head, step=step)
    return Studied(captured=captured, name=name, study=study, selection=selection)


def _draw(options: InspectOptions, found: Studied) -> dict[float, Path]:
    """One picture a sparsity."""
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {sparsity: options.out / f"maps-{100 * sparsity:g}.png" for sparsity in options.sparsity}
    for sparsity, path in figures.items():
        maps_figure(path, found.study, sparsity, options.rectify, found.name)
    return figures


def _write_tables(
    options: InspectOptions, rows: Sequence[ResultRow], selection: Sequence[SelectionRow], device: torch.device
) -> None:
    made_on = machine(device, options.command)
    write_csv(options.out / "results.csv", rows, made_on)
    if selection:
        write_csv(options.out / "selection.csv", selection, made_on)


def results_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Every mode at every sparsity, as a Markdown table that can be pasted."""
    names = ("output error", "computed pairs", "kept mass", "mass error", "R error", "misplaced", "compensated")
    table = _table(title, ("sparsity", "rectify"), names)
    for row in rows:
        table.add_row(
            f"{row.sparsity:g}",
            row.rectify,
            f"{row.relative_error:.3f}",
            percent(row.density),
            percent(row.kept_mass),
            f"{row.mass_error:.3f}",
            f"{row.r_error:.3f}" if row.compensated else "",
            percent(row.misplaced),
            percent(row.compensated),
        )
    return table


def selection_table(rows: Sequence[SelectionRow], rectify: str) -> Table:
    """Every selector at every sparsity."""
    names = ("recall", "captured mass", "output error, none", f"output error, {rectify}")
    table = _table("how well the critical blocks are chosen", ("sparsity", "blocks chosen by"), names)
    for row in rows:
        errors = (f"{row.plain:.3f}", f"{row.rectified:.3f}")
        table.add_row(f"{row.sparsity:g}", row.selector, percent(row.recall), percent(row.captured), *errors)
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.MARKDOWN)
    for name in (*words, *numbers):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def _load(options: InspectOptions, device: torch.device) -> Any:
    try:
        return load_pipeline(options.model, device, options.dtype, options.offload)
    except RuntimeError as error:
        raise InspectError(str(error)) from error


def _settings(pipe: Any, options: InspectOptions) -> Settings:
    try:
        return call_settings(pipe, given_settings(options), {})
    except (TypeError, ValueError) as error:
        raise InspectError(str(error)) from error


def _place(pipe: Any, options: InspectOptions, settings: Settings) -> tuple[int, int]:
    """Layer and step, checked before anything runs."""
    transformer: Any = getattr(pipe, "transformer", None)
    try:
        layers = len(adapter_for(transformer).attentions(transformer))
    except TypeError as error:
        raise InspectError(f"--model {options.model}: {error}") from error
    layer = layers // 2 if options.layer is None else options.layer
    step = settings.steps // 2 if options.step is None else options.step
    for name, value, count in (("layer", layer, layers), ("step", step, settings.steps)):
        if value >= count:
            raise InspectError(f"--{name}: got {value}; allowed: 0 to {count - 1}.")
    return layer, step


def _row(name: CallName, result: HeadResult) -> ResultRow:
    own = [field.name for field in fields(ResultRow) if field.name not in ("layer", "head", "step")]
    return ResultRow(layer=name.layer, head=name.head, step=name.step, **{each: getattr(result, each) for each in own})


def _call_record(found: Studied) -> dict[str, Any]:
    call, layout = found.captured, found.study.layout
    return {
        "layer": found.name.layer,
        "name": call.name,
        "head": found.name.head,
        "step": found.name.step,
        "grid": list(call.grid),
        "num_blocks": layout.num_blocks,
        "isolated": layout.leftover + int(call.text_mask[0].sum()),
    }
