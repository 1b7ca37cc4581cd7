"""A field of a frozen dataclass that a command fills: declared once, with what the command line shows of it."""

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


def option(help: str, default: Any = MISSING, *, choices: Sequence[str] = (), flag: str = "", unset: str = "") -> Any:
    """`default` is the field's (without one it must be given); the rest is what the command line shows.

    help     one sentence; choices: words that are listed behind it (checking them is the dataclass's own affair)
    flag     names in place of "--field-name", separated by spaces; "ARGUMENT" for a positional argument
    unset    what happens where nothing is given, in words: shown in place of the default
    """
    listed = f"{help} One of {', '.join(choices)}." if choices else help
    return field(default=default, metadata={"help": listed, "flag": flag, "unset": unset})
