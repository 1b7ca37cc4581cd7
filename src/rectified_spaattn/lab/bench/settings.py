"""What `bench op` and `bench model` are asked for alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import SparseConfig, check_choice
from ..machine import DEVICES, device_of
from ..option import ConfigOptions, option
from .baselines import BASELINES
from .shapes import DTYPES, BenchError

FEWEST_REPEATS = 2  # for quartiles


@dataclass(frozen=True, kw_only=True)
class BenchSettings(ConfigOptions):
    """One run. Raises ValueError or TypeError for values out of range.

    baseline  empty for those that are timed unasked; one that is named and cannot run is an error
    repeats   rounds that count
    """

    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", ())
    baseline: tuple[str, ...] = option(
        "Dense attention to compare with; may be repeated.", (), choices=tuple(BASELINES)
    )
    dtype: str = option("Of the inputs.", "bfloat16", choices=tuple(DTYPES))
    repeats: int = option("Rounds that count; every round runs every call once.", 10)
    device: str = option("Where to run.", "auto", choices=DEVICES)
    csv_dir: Path | None = option("Folder for the rows as CSV files.", None)

    def __post_init__(self) -> None:
        check_names("baseline", self.baseline, tuple(BASELINES))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("device", self.device, DEVICES)
        if self.repeats < FEWEST_REPEATS:
            raise ValueError(f"repeats: got {self.repeats}; allowed: {FEWEST_REPEATS} or more.")
        if len(set(self.sparsity)) != len(self.sparsity):
            raise ValueError(f"sparsity: got {list(self.sparsity)}; allowed: values that differ.")
        for sparsity in self.sparsity:
            self.config(sparsity=sparsity)
        self.config()

    def config(self, **more: Any) -> SparseConfig:
        """The settings without a schedule, and with exactly the nominal share of blocks: attention to random numbers is
        flat, and top-p would keep most of them.
        """
        nominal = {"top_p": 0.0, "neighbours": False, "first_frame": False, "dense_steps": 0, "dense_layers": ()}
        return super().config(**nominal, **more)

    def where(self) -> torch.device:
        """Raises BenchError where a GPU is asked for and there is none."""
        try:
            return device_of(self.device)
        except ValueError as error:
            raise BenchError(
                f"{error} Or choose what is small: `bench op --shape tiny`, `bench model --size tiny`."
            ) from error


def check_names(what: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises ValueError for a name that is not allowed or comes twice."""
    for name in names:
        check_choice(what, name, tuple(allowed))
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: got {list(names)}; allowed: names that differ.")


def runnable(
    what: str, asked: Sequence[str], reasons: Mapping[str, str | None], shape: str, unasked: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Which of the names asked for can run, and the reasons why the others cannot.

    reasons: name -> why it cannot run here, None where it can; unasked: in place of none asked for, empty for all.
    Raises BenchError where one asked for, or all, cannot.
    """
    able = [name for name, reason in reasons.items() if reason is None]
    chosen = asked or unasked or tuple(reasons)
    unable = {name: reason for name in chosen if (reason := reasons[name]) is not None}
    if unable and (asked or len(unable) == len(chosen)):
        listed = "; ".join(f"{name}: {reason}" for name, reason in unable.items())
        raise BenchError(f"{what} {listed}; allowed for {shape} here: {able}.")
    return [name for name in chosen if name in able], unable
