"""A frozen dataclass becomes a command: names, defaults, repetition, errors."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from rectified_spaattn.cli.console import markdown_table, print_wide, progress_bars, row_table, short_label, shown
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


def test_ctrl_c_says_in_one_line_whether_the_same_command_goes_on() -> None:
    def stop(options: Options) -> None:
        raise KeyboardInterrupt

    for goes_on, told in ((True, "goes on from here"), (False, "begins again from the start")):
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(command(Options, stop, goes_on=lambda options, answer=goes_on: answer))
        result = CliRunner().invoke(app, ["a"])
        assert result.exit_code == 130
        assert result.output.count("\n") == 1
        assert told in result.output


ROWS = [{"attention": "dense cudnn", "sparsity": 0.8, "ms": 271.6, "speed-up over cudnn": 1.0, "min to max": "1 to 2"}]
COLUMNS = {name: f"{{0[{name}]}}" for name in ROWS[0]}


def test_a_table_has_few_columns_on_a_terminal_and_all_elsewhere() -> None:
    assert shown(COLUMNS, ("attention", "ms", "speed-up"), True) == COLUMNS
    short = shown(COLUMNS, ("attention", "ms", "speed-up"), False)
    assert list(short) == ["attention", "ms", "speed-up"]
    text = io.StringIO()
    title = "what was measured, with words that are broken between each other where eighty columns are too few"
    print_wide(Console(file=text, force_terminal=True, width=80, no_color=True), row_table(short, ROWS, title))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"\| dense cudnn \| 271\.6 \| +1\.0 \|", line) for line in lines)
    piped = io.StringIO()
    print_wide(Console(file=piped, width=80), row_table(COLUMNS, ROWS))
    assert "min to max" in piped.getvalue()


def test_bars_are_for_terminals() -> None:
    text = io.StringIO()
    with progress_bars(Console(file=text, force_terminal=False)) as bars:
        bars.update(bars.add_task("clips", total=1), completed=1)
    assert text.getvalue() == ""
    assert short_label("a mode with a name that is much too long") == "a mode with a name that is …"


def test_no_figure_is_cut_where_a_terminal_is_narrow() -> None:
    text = io.StringIO()
    rows = [["reference, in words", "bfloat16, heads of 128, blocks of 128", "0.000123", "1.8e-05"]]
    table = markdown_table(("backend", "call", "error", "allowed"), rows)
    print_wide(Console(file=text, force_terminal=True, width=48, no_color=True), table)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines())) <= 48
    for words in rows[0][2:]:
        assert f" {words} |" in text.getvalue()
    assert "…" not in text.getvalue()
