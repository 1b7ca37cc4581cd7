"""What `rectified-spaattn inspect` does: load, capture, study, draw, write."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..config import RECTIFY_MODES, SparseConfig
from ..lab.calls.capture import AttentionCall, capture_calls
from ..lab.calls.maps import HeadResult, HeadStudy, one_head, study_head
from ..lab.clips.clip import Pair
from ..lab.clips.evaluate import base_configs
from ..lab.clips.models import call_arguments, call_defaults, load, source_of, with_image
from ..lab.clips.options import DEMO, ClipError
from ..lab.machine import device_of, machine
from ..lab.pages.figures import CallName
from ..lab.pages.html import percent, write_inspection
from ..lab.pages.maps import maps_figure
from ..lab.rows import write_atomically, write_rows
from ..pipelines.adapters import adapter_for
from .console import markdown_table, plain_console, print_wide, progress
from .inspect import InspectOptions
from .options import command_line


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A line of results.csv; see lab.calls.maps.HeadResult for what the numbers are."""

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
    """What was measured of one head; captured: the call with all heads."""

    captured: AttentionCall
    name: CallName
    study: HeadStudy


def run(options: InspectOptions) -> Path:
    """The whole command. Returns the path of inspect.html.

    Raises ClipError where the model cannot be loaded, has no adapter, or has no such layer, head or step.
    """
    console, device, out = plain_console(), device_of(options.device), options.out
    source = source_of(options)
    pipe = load(source, options, device)
    where, arguments = machine(device), call_arguments(source, options)
    call = call_defaults(source) | arguments
    layer, step = _place(pipe, options, call["num_inference_steps"])
    try:
        config = options.config(base_configs(source, pipe, options.sparsity)[0])
        studied = _study(pipe, options, config, arguments, layer, step, device)
    except ValueError as error:
        raise ClipError(str(error)) from error
    figures = {sparsity: out / f"maps-{100 * sparsity:g}.png" for sparsity in options.sparsity}
    for sparsity, path in figures.items():
        write_atomically(path, lambda to: maps_figure(to, studied.study, sparsity, options.rectify, studied.name))  # noqa: B023
    rows = [_row(studied.name, result) for result in studied.study.results]
    write_rows(out / "results.csv", rows, where.origin(command_line()))
    record = {
        "command": command_line(),
        **where.to_dict(),
        "model": "the demo model" if options.model == DEMO else options.model,
        "prompt": options.prompt,
        "seed": options.seed,
        "call_arguments": call,
        "config": config.to_dict(),
        "call": _call_record(studied),
        "results": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(out / "inspect.json", lambda to: to.write_text(text, encoding="utf-8"))
    page = out / "inspect.html"
    write_inspection(page, record, figures)
    print_wide(console, results_table(rows, f"{studied.name} of {record['model']}"))
    console.print(f"Page: {page.resolve()}")
    return page


def _study(
    pipe: Any,
    options: InspectOptions,
    config: SparseConfig,
    arguments: Mapping[str, Any],
    layer: int,
    step: int,
    device: torch.device,
) -> Studied:
    """Generate up to the step with full attention, take the layer's call, and measure one head of it."""
    work = step + 1 + 2 + len(options.sparsity) * len(RECTIFY_MODES)
    count = itertools.count(1)
    with progress(plain_console()) as watch:

        def advance(what: str) -> None:
            watch(what, next(count), work)

        pair = Pair(prompt=options.prompt, seed=options.seed)
        captured = capture_calls(
            pipe,
            [pair],
            with_image(dict(arguments)),
            steps=[step],
            layers=[layer],
            on_step=lambda steps: advance(f"denoising step {steps}"),
        )[0]
        head = captured.q.shape[2] // 2 if options.head is None else options.head
        study = study_head(one_head(captured, head, device), config, options.sparsity, on_result=advance)
    return Studied(captured=captured, name=CallName(layer=layer, head=head, step=step), study=study)


def results_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Every mode at every sparsity, as a Markdown table that can be pasted."""
    numbers = ("output error", "computed pairs", "kept mass", "mass error", "R error", "misplaced", "compensated")
    cells = [
        [
            f"{row.sparsity:g}",
            row.rectify,
            f"{row.relative_error:.3f}",
            percent(row.density),
            percent(row.kept_mass),
            f"{row.mass_error:.3f}",
            f"{row.r_error:.3f}" if row.compensated else "",
            percent(row.misplaced),
            percent(row.compensated),
        ]
        for row in rows
    ]
    return markdown_table(("sparsity", "rectify", *numbers), cells, title, left=("sparsity", "rectify"))


def _place(pipe: Any, options: InspectOptions, steps: int) -> tuple[int, int]:
    """Layer and step, checked before anything runs."""
    layers = len(adapter_for(pipe.transformer).attentions(pipe.transformer))
    layer = layers // 2 if options.layer is None else options.layer
    step = steps // 2 if options.step is None else options.step
    for name, value, count in (("layer", layer, layers), ("step", step, steps)):
        if value >= count:
            raise ClipError(f"--{name}: got {value}; allowed: 0 to {count - 1}.")
    return layer, step


def _row(name: CallName, result: HeadResult) -> ResultRow:
    own = [field.name for field in fields(ResultRow) if field.name not in ("layer", "head", "step")]
    return ResultRow(layer=name.layer, head=name.head, step=name.step, **{each: getattr(result, each) for each in own})


def _call_record(studied: Studied) -> dict[str, Any]:
    call, blocks = studied.captured, studied.study.blocks
    return {
        "layer": studied.name.layer,
        "name": call.name,
        "head": studied.name.head,
        "step": studied.name.step,
        "grid": list(call.grid),
        "num_blocks": blocks.num_blocks,
        "isolated": blocks.leftover + int(call.text_mask[0].sum()),
    }
