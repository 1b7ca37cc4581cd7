"""The typer application: one function a command, options in, everything else elsewhere."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..device import device_of
from ..evaluation.paired import NothingSparseError
from .bench import bench_app
from .demo_options import DEFAULT, QUICK, DemoOptions
from .evaluate import evaluate
from .generate import generate
from .inspect import inspect

app = typer.Typer(
    name="rectified-spaattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.command()(generate)
app.command()(evaluate)
app.command(name="inspect")(inspect)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rectified-spaattn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rectified SpaAttn: training-free block-sparse attention for video diffusion transformers."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, videos, figures and metrics.json.")] = Path(
        "demo-output"
    ),
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"A first look: {QUICK.prompts} prompt, {QUICK.steps} steps, no 96 x 96 timing."),
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(help=f"How many of the fixed prompts.  [default: {DEFAULT.prompts}]")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A caption of your own, in the words the model knows; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per prompt: 0, 1, ...")] = DEFAULT.seeds,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps.  [default: {DEFAULT.steps}]")] = None,
    size: Annotated[
        int, typer.Option(help="Height and width in pixels; the model was trained at 64 and 96.")
    ] = DEFAULT.size,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Share of blocks to drop; may be repeated.  [default: 0.8 and 0.9]")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = DEFAULT.block_size,
    top_p: Annotated[float, typer.Option(help="Least attention mass the kept blocks hold.")] = DEFAULT.top_p,
    neighbours: Annotated[
        bool, typer.Option(help="Always keep blocks that touch in 3-D; on small grids these alone are many.")
    ] = DEFAULT.neighbours,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = DEFAULT.device,
    backend: Annotated[str, typer.Option(help="Attention backend, or auto.")] = DEFAULT.backend,
    weights: Annotated[Path | None, typer.Option(help="Folder with weights of your own training.")] = None,
) -> None:
    """Generate the same videos with full, sparse and rectified attention, and write a report about them."""
    base = QUICK if quick else DEFAULT
    try:
        options = DemoOptions(
            out=out,
            prompts=base.prompts if prompts is None else prompts,
            captions=tuple(prompt or ()),
            seeds=seeds,
            steps=base.steps if steps is None else steps,
            size=size,
            sparsity=tuple(sorted(set(sparsity))) if sparsity else DEFAULT.sparsity,
            block_size=block_size,
            top_p=top_p,
            neighbours=neighbours,
            device=device,
            backend=backend,
            weights=weights,
            timing_size=base.timing_size,
            command=shlex.join(["rectified-spaattn", *sys.argv[1:]]),
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    from .demo import run

    try:
        run(options)
    except NothingSparseError as error:
        raise SystemExit(str(error)) from error


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """What every backend would do on this machine and why not, and a check of those that run.

    Exit code 0: at least one backend is right and none is wrong; 1 otherwise.
    """
    from .doctor import run

    try:
        chosen = device_of(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(0 if run(chosen, as_json) else 1)
