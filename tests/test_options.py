"""A frozen dataclass becomes a command: names, defaults, repetition, errors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rectified_spaattn.cli.options import command, command_line
from rectified_spaattn.lab.option import option


@dataclass(frozen=True, kw_only=True)
class Base:
    device: str = option("Where.", "auto", choices=("auto", "cpu"))

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device: got {self.device!r}; allowed: auto, cpu.")


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    names: tuple[str, ...] = option("Which.", flag="ARGUMENT")
    sparsity: tuple[float, ...] = option("Shares.", (0.5, 0.8))
    steps: int | None = option("Steps.", None, unset="the model's")
    full: bool = option("All.", False)
    compiled: bool = option("Compile.", True, flag="--compile/--no-compile")
    neighbours: bool | None = option("Touching.", None, unset="as it is")
    out: Path | None = option("Folder.", None, flag="--out -o")
    internal: int = 3


class Broken(Exception):
    pass


def invoke(*arguments: str) -> tuple[Any, list[Options]]:
    filled: list[Options] = []

    def measure(options: Options) -> None:
        """Measures it."""
        filled.append(options)
        if options.steps == 13:
            raise Broken("13 is out of order")

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command(Options, measure, (Broken,)))
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}), filled


def test_fields_are_filled_from_the_command_line_and_have_their_defaults() -> None:
    result, filled = invoke("a")
    assert result.exit_code == 0, result.output
    assert filled == [Options(names=("a",))]
    result, filled = invoke(
        "a", "b", "--sparsity", "0.1", "--sparsity", "0.2", "--steps", "4", "--full", "--no-compile",
        "--no-neighbours", "-o", "x", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert filled == [
        Options(
            names=("a", "b"), sparsity=(0.1, 0.2), steps=4, full=True, compiled=False, neighbours=False, out=Path("x"),
            device="cpu",
        )
    ]  # fmt: skip


def test_help_shows_what_the_fields_say_own_options_first() -> None:
    printed = invoke("--help")[0].output
    assert "Measures it." in printed
    lines = [" ".join(line.strip("│ ").split()) for line in printed.splitlines()]
    shown = "\n".join(lines)
    assert re.search(r"--sparsity \S+ Shares. \[default: 0.5, 0.8\]", shown)
    assert re.search(r"--steps \S+ Steps. \[default: \(the model's\)\]", shown)
    assert re.search(r"--device \S+ Where. One of auto, cpu. \[default: auto\]", shown)
    assert "--no-full" not in printed
    assert "internal" not in printed
    assert shown.index("--neighbours") < shown.index("--device")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["a", "--device", "tpu"], 2, "device: got 'tpu'; allowed: auto, cpu."),
        ([], 2, "Missing argument"),
        (["a", "--steps", "13"], 1, "13 is out of order"),
        (["a", "--internal", "4"], 2, "No such option"),
    ],
)
def test_errors_are_sentences(arguments: list[str], code: int, problem: str) -> None:
    result, _ = invoke(*arguments)
    assert result.exit_code == code
    assert problem in result.output
    assert "Traceback" not in result.output


def test_what_was_typed_can_be_pasted() -> None:
    assert command_line(["bench", "op", "--shape", "a b"]) == "rectified-spaattn bench op --shape 'a b'"
