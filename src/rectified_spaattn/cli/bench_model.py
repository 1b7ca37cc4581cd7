"""`rectified-spaattn bench model`: options in, tables and CSV files out."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..benchmark.baselines import BASELINES
from ..benchmark.model import ModelSettings
from ..benchmark.models import MODELS, SIZES
from ..benchmark.op import DTYPES
from ..config import RECTIFY_MODES
from ..curve import ORDERS

DEFAULT = ModelSettings()
FORWARDS_CSV, SCHEDULES_CSV = "model-forward.csv", "model-schedule.csv"


def model(
    name: Annotated[list[str], typer.Argument(help=f"{', '.join(MODELS)}; several are timed one after the other.")],
    size: Annotated[
        str, typer.Option(help=f"{', '.join(SIZES)}: tiny has the same layers, narrow and few, for a CPU.")
    ] = DEFAULT.size,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of blocks to drop; may be repeated.", show_default="the preset's, the paper's and 0.8895"
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(BASELINES)}; may be repeated.",
            show_default="cudnn, fa4 where installed; sdpa on a CPU",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of sparse attention, or auto.")] = DEFAULT.backend,
    units: Annotated[
        int | None,
        typer.Option(
            help="Units of layers in the deeper of the two models that are timed; the other has one.",
            show_default="2 where a unit is 1 double and 2 single layers, 3 where it is one layer",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also run all layers once: eager dense, and the sparsest.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time compile_repeated_blocks(fullgraph=True).")
    ] = True,
    compiler: Annotated[str, typer.Option(help="Backend of torch.compile.")] = str(DEFAULT.compiler),
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.", show_default="the model's, 50")] = None,
    computed_steps: Annotated[
        int | None, typer.Option(help="Steps that a cache such as TeaCache leaves to compute.", show_default="all")
    ] = None,
    computed_steps_source: Annotated[
        str, typer.Option(help="Where that number comes from: a measurement or a publication.")
    ] = "",
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = DEFAULT.block_size,
    rectify: Annotated[str, typer.Option(help=f"{', '.join(RECTIFY_MODES)}.")] = DEFAULT.rectify,
    order: Annotated[str, typer.Option(help=f"{', '.join(ORDERS)}.")] = DEFAULT.order,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = DEFAULT.dtype,
    repeats: Annotated[int, typer.Option(help="Rounds that count, after one that warms up.")] = DEFAULT.repeats,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULT.device,
    csv_dir: Annotated[Path | None, typer.Option(help=f"Folder for {FORWARDS_CSV} and {SCHEDULES_CSV}.")] = None,
) -> None:
    """Whole transformers of published models, random weights: a forward, and the denoising run it makes."""
    from ..benchmark.check import BenchError

    try:
        settings = ModelSettings(
            models=tuple(name),
            size=size,
            sparsities=tuple(sorted(sparsity or ())),
            baselines=tuple(baseline or ()),
            backend=backend,
            block_size=block_size,
            rectify=rectify,  # type: ignore[arg-type]  # SparseConfig checks it
            order=order,
            dtype=dtype,
            units=units,
            repeats=repeats,
            compiler=compiler if compiled else None,
            full=full,
            steps=steps,
            computed_steps=computed_steps,
            source=computed_steps_source,
            device=device,
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        _run(settings, csv_dir)
    except BenchError as error:
        raise SystemExit(str(error)) from error


def _run(settings: ModelSettings, csv_dir: Path | None) -> None:
    from rich.console import Console

    from ..benchmark.check import BenchError
    from ..benchmark.model import measure
    from ..benchmark.record import ForwardRow, ScheduleRow, machine, write_csv
    from .bench_tables import machine_line
    from .console import print_wide, progress
    from .model_tables import (
        checks_line,
        forward_line,
        forward_table,
        full_table,
        how_scaled,
        schedule_line,
        schedule_table,
    )

    device = settings.where()
    if device.type == "cpu" and settings.size == "full":
        raise BenchError("size: got 'full' on a CPU, where a forward takes hours; allowed: --size tiny.")
    console = Console()
    made_on = machine(device, shlex.join(["rectified-spaattn", *sys.argv[1:]]))
    print_wide(console, machine_line(made_on))
    forwards: list[ForwardRow] = []
    schedules: list[ScheduleRow] = []
    for name in settings.models:
        with progress(console) as watch:
            measured = measure(name, settings, watch)
        print_wide(console, checks_line(name, measured.checks))
        print_wide(console, forward_line(measured.forwards[0], made_on))
        print_wide(console, forward_table(measured.forwards))
        print_wide(console, how_scaled(measured.forwards[0]))
        for baseline, reason in measured.not_run.items():
            print_wide(console, f"not run: dense {baseline}: {reason}")
        if settings.full:
            print_wide(console, f"{name}: scaled, and measured with all layers, one forward:")
            print_wide(console, full_table(measured.forwards))
        print_wide(console, schedule_line(measured.schedules[0]))
        print_wide(console, schedule_table(measured.schedules))
        took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in measured.took.items())
        print_wide(console, f"{name} took: {took}")
        forwards, schedules = forwards + measured.forwards, schedules + measured.schedules
        if csv_dir is not None:  # after every model: a long run that is stopped leaves what it measured
            write_csv(csv_dir / FORWARDS_CSV, forwards, made_on)
            write_csv(csv_dir / SCHEDULES_CSV, schedules, made_on)
    if csv_dir is not None:
        console.print(f"Forwards: {csv_dir / FORWARDS_CSV}", soft_wrap=True)
        console.print(f"Runs: {csv_dir / SCHEDULES_CSV}", soft_wrap=True)
