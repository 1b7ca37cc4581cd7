"""The list of configurations that an evaluation compares: from a grid of settings, and from files."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SparseConfig, read_yaml
from .paired import Mode, full_mode
from .run import FLOOR


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of the values; an empty list keeps the base's own. overrides: other fields, for all."""

    rectify: Sequence[str] = ()
    sparsity: Sequence[float] = ()
    block_size: Sequence[int] = ()
    order: Sequence[str] = ()
    overrides: Mapping[str, Any]

    def given(self) -> bool:
        """Whether there is anything to combine."""
        return any((self.rectify, self.sparsity, self.block_size, self.order))


def reference_modes(dense_kernel: str, floor_kernel: str) -> list[Mode]:
    """Full attention, and once more on another kernel: what cannot be told from it cannot be told from rounding."""
    if dense_kernel == floor_kernel:
        raise ValueError(f"floor_kernel: got {floor_kernel!r}; allowed: another one than dense_kernel.")
    full = full_mode()
    return [
        Mode(name=full.name, label=full.label, config=None, kernel=dense_kernel),
        Mode(
            name=FLOOR, label=f"full attention, {floor_kernel} kernel (noise floor)", config=None, kernel=floor_kernel
        ),
    ]


def grid_modes(base: Sequence[SparseConfig], grid: Grid, dense_kernel: str) -> list[Mode]:
    """base: one config, or one a transformer. Raises TypeError or ValueError as SparseConfig does."""
    names = ("sparsity", "rectify", "block_size", "order")
    lists = [tuple(dict.fromkeys(getattr(grid, name))) or (getattr(base[0], name),) for name in names]
    modes = []
    for values in itertools.product(*lists):
        chosen = dict(zip(names, values, strict=True))
        asked = {name: value for name, value in chosen.items() if getattr(grid, name)}
        config, *more = (each.replace(**grid.overrides, **asked) for each in base)
        parts = [config.rectify, f"{100 * config.sparsity:g}"]
        labels = [config.rectify, f"{100 * config.sparsity:g}%"]
        if len(lists[2]) > 1:
            parts.append(f"b{config.block_size}")
            labels.append(f"block {config.block_size}")
        if len(lists[3]) > 1:
            parts.append(config.order)
            labels.append(config.order)
        modes.append(
            Mode(name="-".join(parts), label=", ".join(labels), config=config, more=tuple(more), kernel=dense_kernel)
        )
    return modes


def file_mode(path: Path, dense_kernel: str) -> Mode:
    """The mode of a YAML file: one mapping with fields of SparseConfig, or a list of one a transformer."""
    values = read_yaml(path)
    several = values if isinstance(values, list) else [values]
    if not several or not all(isinstance(each, dict) for each in several):
        raise TypeError(f"{path}: got {values!r}; allowed: a mapping, such as 'sparsity: 0.8', or a list of them.")
    config, *more = (SparseConfig.from_dict(each) for each in several)
    return Mode(name=path.stem, label=path.stem, config=config, more=tuple(more), kernel=dense_kernel)


def check_names(modes: Sequence[Mode]) -> None:
    """Raises ValueError where two modes have one name, or a name is not fit for a folder."""
    names = [mode.name for mode in modes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"config: got {name!r} twice; allowed: files and grid values whose names differ.")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"config: got a file called {name!r}; allowed: letters, digits and . + - _ in its name.")
