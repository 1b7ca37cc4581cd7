"""Rows read back from CSV, as lab.rows writes them."""

import csv
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rectified_spaattn.lab.machine import Origin
from rectified_spaattn.lab.rows import FORMULA

R = TypeVar("R")


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
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
