"""Rows: dataclasses to CSV, in files that are complete or not there at all.

A cell is a number, True or False, or text. None and NaN are empty cells. Text that a spreadsheet would take for a
formula (it begins with = + - @) gets a ' in front.
"""

import csv
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from .machine import Origin

T = TypeVar("T")
FORMULA = re.compile(r"'*[=+\-@]")


def write_rows(path: Path, rows: Sequence[Any], origin: Origin | None = None) -> None:
    """One line a row, each with the columns of `origin` after its own. The folder is made where it is missing.

    rows: instances of one dataclass, or mappings with the same keys. Raises ValueError for none.
    """
    if not rows:
        raise ValueError(f"{path}: got no rows; allowed: one or more.")
    added = {} if origin is None else asdict(origin)
    columns = [dict(row) if isinstance(row, Mapping) else asdict(row) for row in rows]
    lines = [{name: _text(value) for name, value in (each | added).items()} for each in columns]

    def write(to: Path) -> None:
        with to.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(path, write)


def write_json(path: Path, values: Any) -> None:
    """Plain values without NaN, as one file that is complete or as it was."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], T]) -> T:
    """Call write(a file beside `path`), flush that file to the disk and move it to `path`. Gives what `write` gave.

    `path` is complete or as it was, whatever happens. The folder is made where it is missing. A process that is killed
    leaves its file behind as ".partial-PID-...".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex[:16]}{path.suffix}")
    try:
        result = write(partial)
        _flush(partial, os.O_RDWR)
        os.replace(partial, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _flush(path.parent, os.O_RDONLY)
        return result
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # of the file that was asked for, not of the partial one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else str(value)
