"""`rectified-spaattn bench`: one function a benchmark; options in, tables, CSV files and figures out."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark.baselines import BASELINES
from ..benchmark.op import DTYPES, OpSettings, backend_names
from ..benchmark.shapes import MODEL_SHAPES, SHAPES
from ..config import RECTIFY_MODES
from ..curve import ORDERS
from .bench_model import model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..benchmark.record import Machine, Row, StageRow

DEFAULT = OpSettings()
ROWS_CSV, STAGES_CSV, PLOT = "op-speed.csv", "op-stages.csv", "op-speed.png"

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed; results are checked before anything is timed.")


bench_app.command()(model)


@bench_app.command()
def op(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SHAPES)}; may be repeated.", show_default=", ".join(DEFAULT.shapes)),
    ] = None,
    all_shapes: Annotated[bool, typer.Option("--all-shapes", help="The shapes of all models.")] = False,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of blocks to drop; may be repeated.", show_default=", ".join(map(str, DEFAULT.sparsities))
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(BASELINES)}; may be repeated.", show_default="all that can run"),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(backend_names())}; may be repeated.", show_default="all that can run"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = DEFAULT.block_size,
    rectify: Annotated[str, typer.Option(help=f"{', '.join(RECTIFY_MODES)}.")] = DEFAULT.rectify,
    order: Annotated[str, typer.Option(help=f"{', '.join(ORDERS)}.")] = DEFAULT.order,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = DEFAULT.dtype,
    repeats: Annotated[
        int, typer.Option(help="Rounds that count; every round runs every call once.")
    ] = DEFAULT.repeats,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULT.device,
    csv_dir: Annotated[
        Path | None, typer.Option(help=f"Folder for {ROWS_CSV}, {STAGES_CSV} and, without --plot, {PLOT}.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the figure, speed-up against sparsity.")] = None,
    plot_from: Annotated[
        Path | None, typer.Option(help=f"Redraw the figure from this {ROWS_CSV}; nothing is measured.")
    ] = None,
) -> None:
    """The operator against dense attention on the shapes of published models."""
    from ..benchmark.check import BenchError

    try:
        if plot_from is not None:
            _replot(plot_from, plot or plot_from.with_suffix(".png"))
            return
        if all_shapes and shape:
            raise ValueError("--all-shapes: got --shape, too; allowed: one of the two.")
        settings = OpSettings(
            shapes=MODEL_SHAPES if all_shapes else tuple(shape or DEFAULT.shapes),
            sparsities=tuple(sorted(sparsity)) if sparsity else DEFAULT.sparsities,
            baselines=tuple(baseline or ()),
            backends=tuple(backend or ()),
            block_size=block_size,
            rectify=rectify,  # type: ignore[arg-type]  # SparseConfig checks it
            order=order,
            dtype=dtype,
            repeats=repeats,
            device=device,
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        _run(settings, csv_dir, plot, named=bool(shape))
    except BenchError as error:
        raise SystemExit(str(error)) from error


def _run(settings: OpSettings, csv_dir: Path | None, plot: Path | None, named: bool) -> None:
    """named: the shapes were asked for by name, so large ones are meant even where there is no GPU."""
    from rich.console import Console

    from ..benchmark.check import BenchError
    from ..benchmark.op import measure
    from ..benchmark.record import machine, write_csv
    from .bench_tables import checks_line, machine_line, speed_table, stage_tables
    from .console import print_wide, progress

    cases = settings.cases()
    if cases[0].device.type == "cpu" and not named:
        raise BenchError(f"{cases[0].shape.name} takes very long on a CPU. Name a shape: --shape tiny.")
    console = Console()
    made_on = machine(cases[0].device, shlex.join(["rectified-spaattn", *sys.argv[1:]]))
    print_wide(console, machine_line(made_on))
    rows: list[Row] = []
    stages: list[StageRow] = []
    for case in cases:
        with progress(console) as watch:
            measured = measure(case, settings, watch)
        print_wide(console, checks_line(case, measured.checks))
        print_wide(console, speed_table(measured.rows, made_on))
        for row in measured.rows:
            if row.not_run:
                print_wide(console, f"not run: {row.kind} {row.name}: {row.not_run}")
        for table in stage_tables(measured.stages):
            print_wide(console, table)
        rows, stages = rows + measured.rows, stages + measured.stages
        if csv_dir is not None:  # after every shape: a long run that is stopped leaves what it measured
            write_csv(csv_dir / ROWS_CSV, rows, made_on)
            if stages:
                write_csv(csv_dir / STAGES_CSV, stages, made_on)
    if csv_dir is not None:
        console.print(f"Rows: {csv_dir / ROWS_CSV}", soft_wrap=True)
        told = csv_dir / STAGES_CSV if stages else "none, as no backend that ran offers its stages"
        console.print(f"Stages: {told}", soft_wrap=True)
    if plot is not None or csv_dir is not None:
        _draw(plot or Path(csv_dir or "") / PLOT, rows, made_on, console)


def _replot(path: Path, plot: Path) -> None:
    from rich.console import Console

    from ..benchmark.record import Row, read_csv

    _draw(plot, *read_csv(path, Row), Console())


def _draw(path: Path, rows: "Sequence[Row]", made_on: "Machine", console: "Console") -> None:
    from ..benchmark.panels import panels
    from ..lab.pages.figures import speed_figure

    drawn = panels(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    speed_figure(path, drawn, f"{made_on.device}, {rows[0].dtype}, torch {made_on.torch}")
    console.print(f"Figure: {path}", soft_wrap=True)
