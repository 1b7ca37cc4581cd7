"""`rectified-spaattn inspect`: one attention head of a running model, under every rectify mode and in pictures."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from ..config import RECTIFY, SparseConfig
from ..lab.calls.capture import CaptureError, capture_calls
from ..lab.calls.maps import HeadStudy, one_head, study_head
from ..lab.calls.options import InspectOptions
from ..lab.clips.clip import Pair
from ..lab.clips.evaluate import base_configs
from ..lab.clips.models import call_arguments, call_defaults, load, source_of, with_pictures
from ..lab.clips.options import ClipError
from ..lab.machine import device_of, machine
from ..lab.pages.html import data_uri, render
from ..lab.pages.maps import maps_figure, told, verdict
from ..lab.pages.styles import label
from ..lab.rows import write_json, write_rows
from ..pipelines.adapters import adapter_for
from .console import Watch, plain_console, print_wide, progress, row_table, shown
from .options import command_line, loading

_SHORT = ("attention", "output error", "computed pairs", "mass error")
_COLUMNS = {
    "attention": "{0[attention]}",
    "output error": "{0[relative_error]:.3f}",
    "computed pairs": "{0[density]:.1%}",
    "kept mass": "{0[kept_mass]:.1%}",
    "mass error": "{0[mass_error]:.3f}",
    "R error": "{0[r_error]:.3f}",
    "misplaced": "{0[misplaced]:.1%}",
    "compensated": "{0[compensated]:.1%}",
}


def run(options: InspectOptions) -> None:
    """Look into one attention head: its error under every rectify mode, and where its attention goes."""
    console, device, out = plain_console(), device_of(options.device), options.out
    source = source_of(options)
    arguments = call_defaults(source) | call_arguments(source, options)
    step = _place("step", options.step, arguments["num_inference_steps"])  # before anything is loaded
    with loading():
        pipe = load(source, options, device)
    try:
        config = options.config_on(base_configs(source, pipe)[0])
        with progress(console) as watch:
            study = _study(pipe, options, config, arguments, step, watch)
    except (TypeError, ValueError, CaptureError) as error:
        raise ClipError(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    figures = {sparsity: out / f"maps-{100 * sparsity:g}.png" for sparsity in options.sparsities}
    for sparsity, path in figures.items():
        maps_figure(path, study, sparsity, config.rectify)
    call, where = study.call, machine(device)
    place = {"layer": call.layer, "head": call.head, "step": call.step}
    rows = [place | each for each in told(study, config)]
    write_rows(out / "results.csv", rows, where.origin(command_line()))
    record = {
        "command": command_line(),
        **where.to_dict(),
        "model": "the demo model" if source.is_demo else source.model,
        "prompt": options.prompt,
        "seed": options.seed,
        "arguments": {argument: value for argument, value in arguments.items() if argument != "prompt"},
        "config": config.to_dict(),
        "call": {
            **place,
            "name": call.name,
            "grid": None if call.layout.grid is None else list(call.layout.grid),
            "num_blocks": study.blocks.num_blocks,
            "isolated": study.blocks.leftover + int(call.text_mask[0].sum()),
        },
        "results": rows,
    }
    write_json(out / "inspect.json", record)
    images, page = {sparsity: data_uri(path) for sparsity, path in figures.items()}, out / "inspect.html"
    words = {"verdict": verdict(rows, config.rectify), "shown": label(config.rectify, config.order)}
    render("inspect.html", page, r=record, figures=images, raw=json.dumps(record, indent=2), **words)
    lines = [row if row["compensated"] else row | {"r_error": None} for row in rows]
    columns = shown(_COLUMNS, _SHORT, not console.is_terminal)
    print_wide(console, row_table(columns, lines, f"{call} of {record['model']}"))
    console.print(f"Page: {page.resolve()}", soft_wrap=True)


def _place(name: str, wanted: int | None, count: int) -> int:
    """The one that is wanted of so many, or the middle one."""
    place = count // 2 if wanted is None else wanted
    if place >= count:
        raise ClipError(f"--{name}: got {place}; allowed: 0 to {count - 1}.")
    return place


def _study(
    pipe: Any, options: InspectOptions, config: SparseConfig, arguments: Mapping[str, Any], step: int, watch: Watch
) -> HeadStudy:
    """Generate up to the step with full attention, take the layer's call with all its heads, and measure one head."""
    layer = _place("layer", options.layer, len(adapter_for(pipe.transformer).attentions(pipe.transformer)))
    count, work = itertools.count(1), step + 1 + 2 + len(options.sparsities) * len(RECTIFY)

    def advance(text: str) -> None:
        watch(text, next(count), work)

    def on_step(steps: int) -> None:
        advance(f"denoising step {steps}")

    pair = Pair(prompt=options.prompt, seed=options.seed)
    [call] = capture_calls(pipe, [pair], with_pictures(arguments), steps=[step], layers=[layer], on_step=on_step)
    alone = one_head(call, call.q.shape[2] // 2 if options.head is None else options.head, pipe._execution_device)
    return study_head(alone, config, options.sparsities, on_result=advance, backend=options.backend)
