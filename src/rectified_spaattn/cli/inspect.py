"""`rectified-spaattn inspect`: one attention head of a running model, under every rectify mode and in pictures."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ORDERS, RECTIFY, SparseConfig, check_choice
from ..lab.clips.options import ClipError, ModelOptions
from ..lab.demo_model.prompts import PROMPTS
from ..lab.option import option
from .console import Watch, plain_console, print_wide, progress, row_table
from .options import command, command_line

if TYPE_CHECKING:  # what runs is imported when it runs
    from ..lab.calls.maps import HeadStudy

_SHOWN = tuple(name for name in RECTIFY if name != "none")
_CONFIG = ("rectify", "block_size", "order", "top_p", "neighbours")
_THE_PRESETS = {"unset": "the preset's"}
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


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """One run; None leaves the choice to the model, its preset or its pipeline.

    Raises ValueError or TypeError for values out of range.
    """

    layer: int | None = option("Self-attention layer, from 0.", None, unset="the middle one")
    head: int | None = option("Head, from 0.", None, unset="the middle one")
    step: int | None = option("Denoising step, from 0.", None, unset="the middle one")
    prompt: str = option("What the model is asked for.", PROMPTS[0])
    seed: int = option("Seed of the noise.", 0)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.8, 0.9))
    config: Path | None = option("YAML file with fields of SparseConfig, instead of a preset.", None, **_THE_PRESETS)
    rectify: str | None = option("The mode that the pictures show beside none.", None, choices=_SHOWN, **_THE_PRESETS)
    block_size: int | None = option("Tokens a block.", None, **_THE_PRESETS)
    order: str | None = option("How blocks are made.", None, choices=ORDERS, **_THE_PRESETS)
    top_p: float | None = option("Least attention mass the kept blocks hold.", None, **_THE_PRESETS)
    neighbours: bool | None = option(
        "Always keep blocks that touch in 3-D; needs an --order other than content.", None, **_THE_PRESETS
    )
    out: Path = option("Folder for the page, pictures and tables.", Path("inspect-output"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer", "head", "step"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}; allowed: 0 or more.")
        if self.config is not None and not self.config.is_file():
            raise ValueError(f"config: got {self.config}; allowed: a YAML file, and there is none at that path.")
        for sparsity in self.sparsity:
            self.config_on(SparseConfig()).replace(sparsity=sparsity)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.sparsity)))

    def config_on(self, base: SparseConfig) -> SparseConfig:
        """What all modes and sparsities have in common: the file or `base`, with the options' own values.

        Raises ValueError where that is a mode with nothing to show beside it.
        """
        start = base if self.config is None else SparseConfig.from_yaml(self.config)
        values = {name: getattr(self, name) for name in _CONFIG}
        config = start.replace(**{name: value for name, value in values.items() if value is not None})
        check_choice("rectify", config.rectify, _SHOWN)
        return config


def run(options: InspectOptions) -> None:
    """Look into one attention head: its error under every rectify mode, and where its attention goes."""
    from ..lab.calls.capture import CaptureError
    from ..lab.clips.evaluate import base_configs
    from ..lab.clips.models import call_arguments, call_defaults, load, source_of
    from ..lab.clips.single import check_writable
    from ..lab.machine import device_of, machine
    from ..lab.pages.html import data_uri, render
    from ..lab.pages.maps import maps_figure, told, verdict
    from ..lab.pages.styles import label
    from ..lab.rows import write_json, write_rows

    console, device, out = plain_console(), device_of(options.device), options.out
    try:
        check_writable(out)
    except OSError as error:
        raise ClipError(f"--out: {out} cannot be written: {error}. Use another one.") from error
    source = source_of(options)
    arguments = call_defaults(source) | call_arguments(source, options)
    step = _place("step", options.step, arguments["num_inference_steps"])  # before anything is loaded
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
    shown = [row if row["compensated"] else row | {"r_error": None} for row in rows]
    print_wide(console, row_table(_COLUMNS, shown, f"{call} of {record['model']}"))
    console.print(f"Page: {page.resolve()}", soft_wrap=True)


inspect = command(InspectOptions, run, (ClipError,))


def _place(name: str, wanted: int | None, count: int) -> int:
    """The one that is wanted of so many, or the middle one."""
    place = count // 2 if wanted is None else wanted
    if place >= count:
        raise ClipError(f"--{name}: got {place}; allowed: 0 to {count - 1}.")
    return place


def _study(
    pipe: Any, options: InspectOptions, config: SparseConfig, arguments: Mapping[str, Any], step: int, watch: Watch
) -> "HeadStudy":
    """Generate up to the step with full attention, take the layer's call with all its heads, and measure one head."""
    from ..lab.calls.capture import capture_calls
    from ..lab.calls.maps import one_head, study_head
    from ..lab.clips.clip import Pair
    from ..lab.clips.models import with_pictures
    from ..pipelines.adapters import adapter_for

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
