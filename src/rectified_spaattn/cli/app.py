"""The typer application: one function a command, options in, everything else elsewhere.

What a command needs is imported when it runs: help and the version come without torch.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..lab.app.options import AppOptions
from ..lab.bench.settings import AdviseSettings, DoctorSettings, ModelSettings, OpSettings
from ..lab.bench.shapes import BenchError
from ..lab.calls.options import InspectOptions
from ..lab.clips.options import ClipError, DemoOptions, EvaluateOptions, GenerateOptions
from ..lab.clips.paths import check_folder, check_ours
from .options import command, loading


class _Sentences(TyperGroup):
    """An error ends a command with a sentence and exit code 1; with --debug it is raised as it is."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
                raise
            text = str(error)
            if not isinstance(error, ClipError | OSError):
                text = f"{type(error).__name__}: {text}\nNot foreseen; `rectified-spaattn --debug ...` tells more."
            raise SystemExit(text) from error


app = typer.Typer(
    cls=_Sentences,
    name="rectified-spaattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed; results are checked before anything is timed.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rectified-spaattn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Rectified SpaAttn: training-free block-sparse attention for video diffusion transformers."""


def _run(module: str, options: object, function: str = "run") -> None:
    """Of the module of a command, imported now."""
    with loading():
        run = getattr(import_module(f".{module}", __package__), function)
    run(options)


def demo(options: DemoOptions) -> None:
    """Make the same clips with full attention, plain sparse, the paper's and ours, and a report about them."""
    check_ours(options.out, "demo")
    _run("demo", options)


def advise(settings: AdviseSettings) -> None:
    """What to expect of a model at a size, without its weights: tokens, computed pairs, share of attention, times."""
    _run("advise", settings)


def doctor(settings: DoctorSettings) -> None:
    """What every backend would do on this machine and why not, and a check of those that run.

    Exit code 0: at least one backend is right and none is wrong; 1 otherwise.
    """
    _run("doctor", settings)


def generate(options: GenerateOptions) -> None:
    """One video or picture with any supported model, and a JSON beside it with everything needed to repeat it."""
    if options.prompts is not None and options.out is not None:
        check_ours(options.out, "generate")
    elif options.out is not None:
        check_folder(options.out.parent)
    _run("generate", options)


def evaluate(options: EvaluateOptions) -> None:
    """Generate the same clips with full attention and every configuration, and measure how far they are apart.

    Stopped runs go on where they were when the same command is given again. Several processes share the prompts:
    accelerate launch --num_processes 4 -m rectified_spaattn evaluate ...
    """
    check_ours(options.out, "evaluate")
    _run("evaluate", options)


def inspect(options: InspectOptions) -> None:
    """Look into one attention head: its error under every rectify mode, and where its attention goes."""
    check_folder(options.out)
    _run("inspect", options)


def browser(options: AppOptions) -> None:
    """Full, plain sparse and ours beside each other in a browser, on this machine: choose, generate, compare."""
    _run("browser", options)


def op(settings: OpSettings) -> None:
    """The operator against dense attention on the shapes of published models."""
    _run("bench", settings, "op")


def model(settings: ModelSettings) -> None:
    """Whole transformers of published models, random weights: a forward, and the denoising run it makes.

    Started by torchrun, all processes share every forward; the first prints and writes.
    """
    _run("bench", settings, "model")


app.command()(command(DemoOptions, demo))
app.command()(command(AdviseSettings, advise, (BenchError,)))
app.command()(command(GenerateOptions, generate, goes_on=lambda options: options.prompts is not None))
app.command()(command(EvaluateOptions, evaluate, goes_on=lambda options: True))
app.command()(command(InspectOptions, inspect, (ClipError,)))
app.command(name="app")(command(AppOptions, browser, (ClipError,)))
app.command()(command(DoctorSettings, doctor))
bench.command()(command(OpSettings, op, (BenchError,)))
bench.command()(command(ModelSettings, model, (BenchError,)))
app.add_typer(bench, name="bench")
