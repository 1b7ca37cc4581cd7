"""A field of a frozen dataclass that a command fills: declared once, with what the command line shows of it."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from ..config import ORDERS, RECTIFY, SparseConfig
from ..presets import PRESET_NAMES, preset

DEFAULT = SparseConfig()


def option(help: str, default: Any = MISSING, *, choices: Sequence[str] = (), flag: str = "", unset: str = "") -> Any:
    """`default` is the field's (without one it must be given); the rest is what the command line shows.

    help     one sentence; choices: words that are listed behind it (checking them is the dataclass's own affair)
    flag     names in place of "--field-name", separated by spaces; "ARGUMENT" for a positional argument
    unset    what happens where nothing is given, in words: shown in place of the default
    """
    listed = f"{help} One of {', '.join(choices)}." if choices else help
    return field(default=default, metadata={"help": listed, "flag": flag, "unset": unset})


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
        asked = {name: getattr(self, name) for name in ("rectify", "order", "block_size")}
        return base.replace(**{name: value for name, value in asked.items() if value is not None} | more)
