"""The modes that an evaluation compares: full attention, a grid of settings, files."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import SparseConfig, read_yaml
from ...presets import preset
from ..pages.styles import FULL, label_of
from .clip import Mode, full_mode
from .options import ClipError

FLOOR = "full-other-kernel"


def reference_modes(floor_kernel: str) -> list[Mode]:
    """Full attention, and once more on another kernel: what cannot be told from it cannot be told from rounding."""
    label = f"{FULL}, {floor_kernel} kernel (noise floor)"
    return [full_mode(), Mode(name=FLOOR, label=label, kernel=floor_kernel)]


def grid_modes(
    base: Sequence[SparseConfig], grid: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any]
) -> list[Mode]:
    """Every combination of the values of sparsity, tolerance, rectify, block_size and order.

    base: one config, or one a transformer. grid: an empty list keeps the base's own. overrides: other fields, for all.
    Raises TypeError or ValueError as SparseConfig does.
    """
    lists = {name: tuple(dict.fromkeys(values)) or (getattr(base[0], name),) for name, values in grid.items()}
    modes = []
    for values in itertools.product(*lists.values()):
        combination = {name: value for name, value in zip(lists, values, strict=True) if grid[name]}
        configs = tuple(each.replace(**overrides, **combination) for each in base)
        config = configs[0]
        kept = f"{100 * config.sparsity:g}" if config.tolerance is None else f"error-{config.tolerance:g}"
        parts = [config.rectify, kept]
        labels = [label_of(config)]
        if len(lists["block_size"]) > 1:
            parts.append(f"b{config.block_size}")
            labels.append(f"block {config.block_size}")
        if len(lists["order"]) > 1:
            parts.append(config.order)
        modes.append(Mode(name="-".join(parts), label=", ".join(labels), configs=configs))
    return modes


def file_mode(path: Path) -> Mode:
    """The mode of a YAML file: one mapping with fields of SparseConfig, or a list of one a transformer."""
    values = read_yaml(path)
    several = values if isinstance(values, list) else [values]
    if not several or not all(isinstance(each, dict) for each in several):
        raise TypeError(f"{path}: got {values!r}; allowed: a mapping, such as 'sparsity: 0.8', or a list of them.")
    try:
        configs = tuple(SparseConfig.from_dict(each) for each in several)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    return Mode(name=path.stem, label=path.stem, configs=configs)


def preset_mode(name: str) -> Mode:
    """The mode of a preset. Raises ValueError for one that there is not."""
    return Mode(name=name, label=name, configs=preset(name))


def check_schedule(modes: Sequence[Mode], steps: int | None) -> None:
    """Raises ClipError where the dense steps of a mode are all that one transformer has to run.

    steps: of the run, None where nobody says. Of two transformers nobody knows who runs which: `check_sparse` tells.
    """
    single = [(mode, *mode.configs) for mode in modes if len(mode.configs) == 1]
    for mode, config in single if steps is not None else ():
        if config.dense_step_count(steps) + config.dense_last_step_count(steps) >= (steps or 0):
            raise ClipError(
                f"{mode.name}: all {steps} steps are dense (dense_steps={config.dense_steps}, dense_last_steps="
                f"{config.dense_last_steps}), so nothing would run sparse; allowed: fewer dense steps, or a fraction "
                "(0.1 is 5 of 50 steps, 1 of 8 and 0 of 4), in a --config file, or more --steps."
            )


def check_names(modes: Sequence[Mode]) -> None:
    """Raises ValueError where two modes have one name, or a name is not fit for a folder."""
    names = [mode.name.casefold() for mode in modes]  # folders of some systems do not tell case apart
    for name, mode in zip(names, modes, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"config: got {name!r} twice; allowed: files and grid values whose names differ.")
        if not re.fullmatch(r"[\w+-][\w.+-]*", name) or len(name.encode()) > 200:
            raise ValueError(
                f"config: got a file called {mode.name!r}; allowed: letters, digits and . + - _ in its name, no dot "
                "in front."
            )
