"""The typer application: one function a command, options in, everything else elsewhere."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..lab.bench.doctor import DoctorSettings
from ..lab.bench.model import ModelSettings
from ..lab.bench.op import OpSettings
from ..lab.bench.shapes import BenchError
from ..lab.clips.options import ClipError, DemoOptions, EvaluateOptions, GenerateOptions
from .bench import model, op
from .doctor import doctor
from .inspect import inspect
from .options import command


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
bench.command()(command(OpSettings, op, (BenchError,)))
bench.command()(command(ModelSettings, model, (BenchError,)))
app.add_typer(bench, name="bench")
app.command()(command(DoctorSettings, doctor))


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


def generate(options: GenerateOptions) -> None:
    """One video or picture with any supported model, and a JSON beside it with everything needed to repeat it."""
    from .generate import run

    run(options)


def evaluate(options: EvaluateOptions) -> None:
    """Generate the same clips with full attention and every configuration, and measure how far they are apart.

    Stopped runs go on where they were when the same command is given again. Several processes share the prompts:
    accelerate launch --num_processes 4 -m rectified_spaattn evaluate ...
    """
    from .evaluate import run

    run(options)


def demo(options: DemoOptions) -> None:
    """Make the same clips with full attention, plain sparse, the paper's and ours, and a report about them."""
    from .demo import run

    run(options)


app.command()(command(GenerateOptions, generate))
app.command()(command(EvaluateOptions, evaluate))
app.command(name="inspect")(inspect)
app.command()(command(DemoOptions, demo))
