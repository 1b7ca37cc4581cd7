"""From the records of an evaluation to its tables: one row a clip, one row a mode."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from .folder import ClipRecord
from .intervals import Interval, bootstrap
from .metrics import finite_or_none
from .paired import FULL, Mode

SCORES = ("psnr", "ssim", "lpips", "flicker")


@dataclass(frozen=True, kw_only=True)
class ModeSummary:
    """One mode over all its clips; intervals are 95%, bootstrapped over the prompt-seed pairs.

    scores        psnr, ssim, lpips (where it was computed) and flicker
    step_seconds  median over the denoising steps of all clips
    speedup       step_seconds of full attention over that of this mode
    """

    mode: Mode
    clips: int
    scores: Mapping[str, Interval]
    density: float
    computed: float
    seconds: float
    step_seconds: float
    speedup: float
    backend: str

    def row(self) -> dict[str, Any]:
        """Plain values for a CSV file; a score that is not there is empty."""
        row: dict[str, Any] = {**mode_columns(self.mode), "clips": self.clips}
        for name in SCORES:
            found = self.scores.get(name)
            row[name] = None if found is None else found.mean
            for end in ("low", "high"):
                value = math.nan if found is None else getattr(found, end)
                row[f"{name}_{end}"] = finite_or_none(value)
        for name in ("density", "computed", "backend", "seconds", "step_seconds", "speedup"):
            row[name] = getattr(self, name)
        return row


def summarise(modes: Sequence[Mode], records: Sequence[ClipRecord]) -> list[ModeSummary]:
    """One row a mode, in the order of `modes`; every mode has records."""
    by_mode = {mode.name: [record for record in records if record.mode == mode.name] for mode in modes}
    steps = {name: median(step for record in own for step in record.step_seconds) for name, own in by_mode.items()}
    return [
        ModeSummary(
            mode=mode,
            clips=len(by_mode[mode.name]),
            scores=_scores(by_mode[mode.name]),
            density=fmean(record.density for record in by_mode[mode.name]),
            computed=fmean(record.computed for record in by_mode[mode.name]),
            seconds=fmean(record.seconds for record in by_mode[mode.name]),
            step_seconds=steps[mode.name],
            speedup=steps[FULL] / steps[mode.name],
            backend=", ".join(sorted({record.backend for record in by_mode[mode.name]} - {""})),
        )
        for mode in modes
    ]


def clip_rows(modes: Sequence[Mode], records: Sequence[ClipRecord]) -> list[dict[str, Any]]:
    """One row a clip with its mode's settings; seconds and step_seconds (their median) come last."""
    by_name = {mode.name: mode for mode in modes}
    rows = []
    for record in records:
        row: dict[str, Any] = {"prompt": record.prompt, "seed": record.seed, **mode_columns(by_name[record.mode])}
        for name in (*SCORES, "density", "computed", "backend", "video", "seconds"):
            row[name] = getattr(record, name)
        rows.append({**row, "step_seconds": median(record.step_seconds)})
    return rows


def mode_columns(mode: Mode) -> dict[str, Any]:
    """The settings of a mode that tables are sorted by; empty for full attention."""
    names = ("sparsity", "rectify", "block_size", "order", "top_p", "neighbours")
    values = {name: None if mode.config is None else getattr(mode.config, name) for name in names}
    return {"mode": mode.name, "dense_kernel": mode.kernel, **values}


def _scores(records: Sequence[ClipRecord]) -> dict[str, Interval]:
    columns = {name: [getattr(record, name) for record in records] for name in SCORES}
    return {name: bootstrap(column) for name, column in columns.items() if None not in column}
