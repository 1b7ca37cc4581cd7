"""Command-line options from the frozen dataclass that they fill: each is declared once, as a field of it."""

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

S = TypeVar("S")
_INTERRUPTED = 130  # as shells have it
_GOES_ON = "Stopped. The same command goes on from here: finished clips are kept."
_ANEW = "Stopped. The same command begins again from the start."


def command(
    kind: type[S],
    run: Callable[[S], object],
    errors: tuple[type[Exception], ...] = (),
    goes_on: Callable[[S], bool] = lambda settings: False,
) -> Callable[..., object]:
    """A function for `typer.Typer.command()` with the name and docstring of `run`, which it calls with a `kind`.

    kind: a frozen dataclass; its fields made by lab.option.option are the options, those of a tuple type may be given
    several times; its own before inherited ones. A TypeError or ValueError that it raises is a usage error (exit code
    2). errors: raised by `run`, each ends the command with its message (exit code 1). goes_on: whether the same command
    takes up what an interrupted one left; Ctrl-C says so in one line (exit code 130).
    """
    hints = get_type_hints(kind)
    shown = [each for each in fields(kind) if "help" in each.metadata]  # type: ignore[arg-type]
    shown.sort(key=lambda each: each.name not in inspect.get_annotations(kind))

    def call(**values: Any) -> object:
        try:
            settings = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        try:
            return run(settings)
        except errors as error:
            raise SystemExit(str(error)) from error
        except KeyboardInterrupt:
            print(_GOES_ON if goes_on(settings) else _ANEW, file=sys.stderr)
            raise SystemExit(_INTERRUPTED) from None

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__signature__ = inspect.Signature([_parameter(each, hints[each.name]) for each in shown])  # type: ignore[attr-defined]
    return call


@contextmanager
def loading() -> Iterator[None]:
    """Say "Loading ..." on a terminal while packages are imported."""
    shown = sys.stderr.isatty()
    if shown:
        print("Loading ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def command_line(arguments: Sequence[str] | None = None) -> str:
    """What was typed, for a record. arguments: without the name of the program; None for those of this process."""
    return shlex.join(["rectified-spaattn", *(sys.argv[1:] if arguments is None else arguments)])


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    flag, unset = field.metadata["flag"], field.metadata["unset"]
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(hint) is tuple:  # typer knows lists
        hint = list[get_args(hint)[0]]  # type: ignore[misc]
        default = list(default) if isinstance(default, tuple) else default
    shown: Any = {"help": field.metadata["help"], "show_default": unset or default not in (None, [], "")}
    if flag == "ARGUMENT":
        info = typer.Argument(**shown)
    elif hint is bool and default is False and not flag:  # no --no-... for what is off anyway
        info = typer.Option(f"--{field.name.replace('_', '-')}", **shown)
    else:
        info = typer.Option(*flag.split(), **shown)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
    )
