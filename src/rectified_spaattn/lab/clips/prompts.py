"""Prompts of an evaluation: one a line of a text file, or one a row of a CSV file with the pictures that go with it."""

import csv
import io
from pathlib import Path

from .options import PICTURES

Prompts = dict[str, dict[str, str]]  # prompt -> argument of the pipeline's call -> file or address of its picture


def read_prompts(path: Path) -> Prompts:
    """The prompts of a file in their order. .csv: columns prompt and some of PICTURES, whose files lie beside it.

    Raises ValueError for a file without any, with the same twice, other columns or empty cells, or that is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got a file that cannot be read as UTF-8 text: {error}") from error
    rows = _table(path, text) if path.suffix == ".csv" else [{"prompt": line.strip()} for line in text.split("\n")]
    rows = [row for row in rows if any(row.values())]
    prompts = [row["prompt"] for row in rows]
    repeated = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if not prompts or repeated:
        got = f"{repeated[0]!r} more than once" if repeated else "no line with text"
        raise ValueError(
            f"{path}: got {got}; allowed: prompts that differ, one a line. --seeds makes more clips of each."
        )
    return {row["prompt"]: {name: _beside(path, row[name]) for name in PICTURES if name in row} for row in rows}


def _table(path: Path, text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text), restval="")
    columns = list(reader.fieldnames or ())
    unknown = sorted(set(columns) - {"prompt", *PICTURES})
    if "prompt" not in columns or unknown:
        raise ValueError(f"{path}: got the columns {columns}; allowed: prompt and, where there are, {list(PICTURES)}.")
    rows = [{name: (cell or "").strip() for name, cell in row.items() if name} for row in reader]
    for number, row in enumerate(rows, 2):
        if any(row.values()) and not all(row.values()):
            raise ValueError(f"{path}, row {number}: got an empty cell; allowed: one value a column, {columns}.")
    return rows


def _beside(path: Path, name: str) -> str:
    return name if name.startswith(("http://", "https://")) else str(path.parent / name)
