"""Rows: dataclasses to CSV and back, in files that are complete or not there at all.

A cell is a number, True or False, or text. None and NaN are empty cells. Text that a spreadsheet would take for a
formula (it begins with = + - @ and is no number) gets a ' in front, which reading takes away.
"""

import csv
import json
import math
import os
import re
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .machine import Origin

R = TypeVar("R")
_FORMULA = re.compile(r"'*[=+\-@]")


def write_rows(path: Path, rows: Sequence[Any], origin: Origin | None = None) -> None:
    """One line a row, each with the columns of `origin` after its own. The folder is made where it is missing.

    rows: instances of one dataclass, or mappings with the same keys. Raises ValueError for none.
    """
    if not rows:
        raise ValueError(f"{path}: got no rows; allowed: one or more.")
    added = {} if origin is None else asdict(origin)
    lines = [{name: _text(value) for name, value in (_columns(row) | added).items()} for row in rows]

    def write(to: Path) -> None:
        with to.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(path, write)


def read_rows(path: Path, kind: type[R]) -> tuple[list[R], Origin]:
    """The rows of a file that write_rows wrote, and the origin of the first.

    kind: a dataclass; columns it does not know are ignored, those of fields with a default may be missing. Raises
    ValueError for another file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: got no such file; allowed: a CSV written by rectified-spaattn.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file, restval=""))
    header = lines[0] if lines else {}
    missing = [
        each.name
        for each in (*fields(kind), *fields(Origin))  # type: ignore[arg-type]
        if each.name not in header and _required(each)
    ]
    if missing:
        raise ValueError(f"{path}: got no column {', '.join(missing)}; allowed: a CSV written by this version.")
    try:
        return [_row(kind, line) for line in lines], _row(Origin, lines[0])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: got a cell that does not fit its column: {error}") from error


def write_json(path: Path, values: Any) -> None:
    """Plain values without NaN, as one file that is complete or as it was."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(a file beside `path`), flush that file to the disk and move it to `path`.

    `path` is complete or as it was, whatever happens. The folder is made where it is missing. A process that is killed
    leaves its file behind as ".partial-PID-...".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex[:16]}{path.suffix}")
    try:
        write(partial)
        _flush(partial, os.O_RDWR)
        os.replace(partial, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _flush(path.parent, os.O_RDONLY)
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


def _columns(row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if is_dataclass(row) and not isinstance(row, type):
        return asdict(row)
    raise TypeError(f"rows: got a {type(row).__name__}; allowed: instances of a dataclass, or mappings.")


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value)
    quoted = isinstance(value, str) and _FORMULA.match(text) is not None and not _is_number(text)
    return f"'{text}" if quoted else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _row(kind: type[Any], line: Mapping[str, str]) -> Any:
    hints = get_type_hints(kind)
    return kind(**{each.name: _value(line[each.name], hints[each.name]) for each in fields(kind) if each.name in line})


def _value(text: str, hint: Any) -> Any:
    """The value of a cell in a column of this type: str, bool, int or float, or one of them or None."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional and text == "":
        return None
    kind = next(each for each in get_args(hint) if each is not type(None)) if optional else hint
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"got {text!r}; allowed: True or False.")
        return text == "True"
    if kind is int:
        return int(text)
    if kind is float:
        return float(text) if text else math.nan
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
