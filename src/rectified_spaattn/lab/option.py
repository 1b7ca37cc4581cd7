"""A field of a frozen dataclass that a command fills: declared once, with what the command line shows of it."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..config import ORDERS, RECTIFY, SparseConfig, check_choice
from ..presets import PRESET_NAMES, preset

DEFAULT = SparseConfig()


def option(
    help: str,
    default: Any = MISSING,
    *,
    choices: Sequence[str] = (),
    least: int | None = None,
    flag: str = "",
    unset: str = "",
) -> Any:
    """`default` is the field's (without one it must be given); the rest is what the command line shows.

    help     one sentence; choices: words that are listed behind it. These alone `check_options` allows, and no number
             below `least`
    flag     names in place of "--field-name", separated by spaces; "ARGUMENT" for a positional argument
    unset    what happens where nothing is given, in words: shown in place of the default
    """
    listed = f"{help} One of {', '.join(choices)}." if choices else help
    metadata = {"help": listed, "choices": tuple(choices), "least": least, "flag": flag, "unset": unset}
    return field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Raises TypeError or ValueError for a value of a field that is none of its choices, or below its least."""
    for each in fields(options):
        value, choices, least = getattr(options, each.name), each.metadata.get("choices"), each.metadata.get("least")
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if choices:
                check_choice(each.name, one, choices)
            if least is not None and one < least:
                raise ValueError(f"{each.name}: got {one}; allowed: {least} or more.")


def given(options: Any, *names: str) -> dict[str, Any]:
    """Those of the fields that are not None."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """The method's settings, as a command takes them. What is None stays as the preset or SparseConfig() has it."""

    preset: str | None = option(f"Settings of a model: {PRESET_NAMES}.", None, unset="SparseConfig()")
    rectify: str | None = option("Mode.", None, choices=tuple(RECTIFY), unset=f"the preset's; {DEFAULT.rectify}")
    order: str | None = option("Of the tokens.", None, choices=ORDERS, unset=f"the preset's; {DEFAULT.order}")
    block_size: int | None = option("Tokens a block.", None, unset=f"the preset's; {DEFAULT.block_size}")

    def config(self, **more: Any) -> SparseConfig:
        """The preset's config (that of its first transformer), changed by the options and `more`.

        Raises ValueError or TypeError for values out of range.
        """
        base = preset(self.preset)[0] if self.preset is not None else DEFAULT
        return base.replace(**given(self, "rectify", "order", "block_size") | more)
