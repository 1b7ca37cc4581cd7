"""Studies from the command line, in this process."""

from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from studies.harness import Sample, application


def run_study(kind: type[Sample], study: Callable[[Any], None], *arguments: str, code: int = 0) -> str:
    """What the study prints; its exit code must be `code`."""
    result = CliRunner().invoke(application(kind, study), arguments, env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def table_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]
