"""`rectified-spaattn inspect`: one attention head of a running model, under every rectify mode and in pictures."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ORDERS, RECTIFY, SparseConfig, check_choice
from ..lab.clips.options import ClipError, ModelOptions
from ..lab.demo_model.prompts import PROMPTS
from ..lab.option import option
from .options import command, command_line

if TYPE_CHECKING:  # what runs is imported when it runs
    from rich.table import Table

    from ..lab.calls.capture import AttentionCall
    from ..lab.calls.maps import HeadResult, HeadStudy
    from ..lab.pages.figures import CallName

_SHOWN = tuple(name for name in RECTIFY if name != "none")
_THE_PRESETS = {"unset": "the preset's"}


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
        names = ("rectify", "block_size", "order", "top_p", "neighbours")
        values = {name: getattr(self, name) for name in names}
        config = start.replace(**{name: value for name, value in values.items() if value is not None})
        check_choice("rectify", config.rectify, _SHOWN)
        return config


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


def run(options: InspectOptions) -> None:
    """Look into one attention head: its error under every rectify mode, and where its attention goes."""
    from ..lab.calls.capture import CaptureError
    from ..lab.clips.evaluate import base_configs
    from ..lab.clips.models import call_arguments, call_defaults, load, source_of
    from ..lab.clips.single import check_writable
    from ..lab.machine import device_of, machine
    from ..lab.pages.html import write_inspection
    from ..lab.pages.maps import maps_figure
    from ..lab.rows import write_rows
    from .console import plain_console, print_wide, progress

    console, device = plain_console(), device_of(options.device)
    try:
        check_writable(options.out)
    except OSError as error:
        raise ClipError(f"--out: {options.out} cannot be written: {error}. Use another one.") from error
    source = source_of(options)
    arguments = call_defaults(source) | call_arguments(source, options)
    step = _step(options, arguments)
    pipe = load(source, options, device)
    try:
        config = options.config_on(base_configs(source, pipe, options.sparsity)[0])
        with progress(console) as watch:
            call, name, study = _study(pipe, options, config, arguments, step, watch)
    except (TypeError, ValueError, CaptureError) as error:
        raise ClipError(str(error)) from error
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {sparsity: options.out / f"maps-{100 * sparsity:g}.png" for sparsity in options.sparsities}
    for sparsity, path in figures.items():
        maps_figure(path, study, sparsity, config.rectify, name)
    rows = [_row(name, result) for result in study.results]
    where = machine(device)
    write_rows(options.out / "results.csv", rows, where.origin(command_line()))
    record = {
        "command": command_line(),
        **where.to_dict(),
        "model": "the demo model" if source.is_demo else source.model,
        "prompt": options.prompt,
        "seed": options.seed,
        "arguments": {argument: value for argument, value in arguments.items() if argument != "prompt"},
        "config": config.to_dict(),
        "call": _call_record(call, name, study),
        "results": [asdict(row) for row in rows],
    }
    (options.out / "inspect.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_inspection(options.out / "inspect.html", record, figures)
    print_wide(console, _table(rows, f"{name} of {record['model']}"))
    console.print(f"Page: {(options.out / 'inspect.html').resolve()}", soft_wrap=True)


inspect = command(InspectOptions, run, (ClipError,))


def _step(options: InspectOptions, arguments: Mapping[str, Any]) -> int:
    """The step to look at, checked before anything is loaded."""
    steps = arguments["num_inference_steps"]
    step = steps // 2 if options.step is None else options.step
    if step >= steps:
        raise ClipError(f"--step: got {step}; allowed: 0 to {steps - 1}.")
    return step


def _study(
    pipe: Any, options: InspectOptions, config: SparseConfig, arguments: Mapping[str, Any], step: int, watch: Any
) -> tuple["AttentionCall", "CallName", "HeadStudy"]:
    """Generate up to the step with full attention, take the layer's call with all its heads, and measure one head."""
    from ..lab.calls.capture import capture_calls
    from ..lab.calls.maps import one_head, study_head
    from ..lab.clips.clip import Pair
    from ..lab.clips.models import with_image
    from ..lab.pages.figures import CallName
    from ..pipelines.adapters import adapter_for

    layers = len(adapter_for(pipe.transformer).attentions(pipe.transformer))
    layer = layers // 2 if options.layer is None else options.layer
    if layer >= layers:
        raise ClipError(f"--layer: got {layer}; allowed: 0 to {layers - 1}.")
    count, work = itertools.count(1), step + 1 + 2 + len(options.sparsities) * len(RECTIFY)

    def advance(text: str) -> None:
        watch(text, next(count), work)

    pair = Pair(prompt=options.prompt, seed=options.seed)
    [call] = capture_calls(
        pipe,
        [pair],
        with_image(dict(arguments)),
        steps=[step],
        layers=[layer],
        on_step=lambda steps: advance(f"denoising step {steps}"),
    )
    head = call.q.shape[2] // 2 if options.head is None else options.head
    alone = one_head(call, head, pipe._execution_device)
    study = study_head(alone, config, options.sparsities, on_result=advance, backend=options.backend)
    return call, CallName(layer=layer, head=head, step=step), study


def _row(name: "CallName", result: "HeadResult") -> ResultRow:
    own = [field.name for field in fields(ResultRow) if field.name not in ("layer", "head", "step")]
    return ResultRow(layer=name.layer, head=name.head, step=name.step, **{each: getattr(result, each) for each in own})


def _call_record(call: "AttentionCall", name: "CallName", study: "HeadStudy") -> dict[str, Any]:
    return {
        **asdict(name),
        "name": call.name,
        "grid": None if call.layout.grid is None else list(call.layout.grid),
        "num_blocks": study.blocks.num_blocks,
        "isolated": study.blocks.leftover + int(call.text_mask[0].sum()),
    }


def _table(rows: Sequence[ResultRow], title: str) -> "Table":
    """Every mode at every sparsity, as a Markdown table that can be pasted."""
    from rich import box
    from rich.table import Table

    from ..lab.pages.html import percent

    table = Table(title=title, box=box.MARKDOWN)
    for name in ("sparsity", "rectify"):
        table.add_column(name, no_wrap=True)
    for name in (
        "output error", "computed pairs", "kept mass", "mass error", "R error", "misplaced", "compensated"
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
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
