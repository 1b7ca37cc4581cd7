"""Clips under a tolerance against clips of one sparsity for all, at equal executed pairs.

    python -m studies.tolerance --pairs 8 --device cuda
    python -m studies.tolerance --table-of runs/tolerance-dev.csv

`density` is executed pairs over all pairs, pooled keys and probe rows counted; `error` and `error_p99` are what probe
rows measured, median and 99th percentile over heads, calls and steps. The second table reads the PSNR of a sparsity off
at the density that a tolerance came to, pair by pair, between the two sparsities around it and in the logarithm of the
density, and the density that a sparsity takes for the same PSNR. With several pairs in a batch figures of density and
error are shared, so that every pair has the batch's.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rectified_spaattn.config import ORDERS, RECTIFY, SparseConfig
from rectified_spaattn.lab.clips.clip import Mode, Pair, full_mode, generate
from rectified_spaattn.lab.clips.metrics import psnr, ssim
from rectified_spaattn.lab.option import option

from . import harness


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97))
    tolerance: tuple[float, ...] = option("Errors to hold.", (0.025, 0.05, 0.1, 0.15))
    mode: tuple[str, ...] = option("Modes.", ("row", "query+slope"), choices=tuple(RECTIFY))
    order: str = option("How tokens are put in blocks.", "content", choices=ORDERS)
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)
    top_p: float = option("Least attention mass the kept blocks hold.", harness.EXACT.top_p)
    max_density: float = option("Largest share of a head's blocks that a tolerance keeps.", 0.5)
    start: float = option("Sparsity that a tolerance starts from.", 0.8)
    backend: str = option("Attention backend, or auto.", "auto")

    @property
    def configs(self) -> Iterator[tuple[str, str, float, SparseConfig]]:
        """Mode, kind, its value and the config."""
        for mode in self.mode:
            base = SparseConfig(rectify=mode, order=self.order, block_size=self.block_size, top_p=self.top_p)  # type: ignore[arg-type]
            for sparsity in self.sparsity:
                yield mode, "sparsity", sparsity, base.replace(sparsity=sparsity)
            base = base.replace(sparsity=self.start, max_density=self.max_density)
            for tolerance in self.tolerance:
                yield mode, "tolerance", tolerance, base.replace(tolerance=tolerance)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One clip. unheld: share of heads of calls that kept all that max_density allows and were above the tolerance."""

    KEYS: ClassVar[tuple[str, ...]] = ("mode", "kind", "value")
    mode: str
    kind: str
    value: float
    density: float
    error: float
    error_p99: float
    unheld: float
    psnr: float
    ssim: float


def measured(pipe: Any, pairs: Sequence[Pair], options: Options) -> Iterator[Row]:
    full = generate(pipe, full_mode(), pairs, options.arguments)
    for mode, kind, value, config in options.configs:
        how = Mode(name=f"{mode}-{kind}-{value:g}", label=mode, configs=(config,))
        clips = generate(pipe, how, pairs, options.arguments, backend=options.backend)
        for pair, clip, reference in zip(pairs, clips, full, strict=True):
            assert clip.stats is not None
            yield Row(
                prompt=pair.prompt,
                seed=pair.seed,
                mode=mode,
                kind=kind,
                value=value,
                density=clip.density,
                error=clip.stats.error,
                error_p99=clip.stats.error_p99,
                unheld=clip.stats.unheld / clip.stats.probed if clip.stats.probed else math.nan,
                psnr=psnr(clip.video[None], reference.video[None]).item(),
                ssim=ssim(clip.video[None], reference.video[None]).item(),
            )


def read_off(points: Iterable[tuple[float, float]], x: float) -> float | None:
    """y at x on straight lines through points (x, y); None outside of them."""
    line = sorted(points)
    if not line or not line[0][0] <= x <= line[-1][0]:
        return None
    i = max(1, bisect_left([at for at, _ in line], x))
    if len(line) == 1 or line[i][0] == line[i - 1][0]:
        return line[0][1] if len(line) == 1 else line[i][1]
    share = (x - line[i - 1][0]) / (line[i][0] - line[i - 1][0])
    return (1 - share) * line[i - 1][1] + share * line[i][1]


def against_uniform(rows: Sequence[Row]) -> str:
    """A Markdown table: what a tolerance gains over one sparsity for all at its pairs, and how many that would take."""
    lines = ["| mode | tolerance | density | PSNR, dB, less that of a sparsity at this density | SSIM less that |"]
    lines[0] += " density less that of a sparsity at this PSNR, % | pairs |"
    lines.append("|---|---|---|---|---|---|---|")
    by_setting = harness.settings_of(rows)
    for (mode, kind, value), mine in by_setting.items():
        if kind != "tolerance":
            continue
        gains: dict[str, list[float]] = {"psnr": [], "ssim": [], "density": []}
        for pair, row in mine.items():
            uniform = [of[pair] for key, of in by_setting.items() if key[:2] == (mode, "sparsity") and pair in of]
            for name in ("psnr", "ssim"):
                at = read_off([(math.log(x.density), getattr(x, name)) for x in uniform], math.log(row.density))
                gains[name] += [] if at is None else [getattr(row, name) - at]
            needed = read_off([(x.psnr, math.log(x.density)) for x in uniform], row.psnr)
            gains["density"] += [] if needed is None else [100 * (row.density / math.exp(needed) - 1)]
        cells = [harness.interval(gains[name], "+") for name in ("psnr", "ssim", "density")]
        density = harness.interval([row.density for row in mine.values()])
        lines.append(f"| {mode} | {value:g} | {density} | {' | '.join(cells)} | {len(gains['psnr'])} |")
    return "\n".join(lines)


def tolerance(options: Options) -> None:
    """A tolerance against one sparsity for all."""

    def measure(pipe, pairs, say):
        say(f"{len(list(options.configs))} settings")
        return list(measured(pipe, pairs, options))

    def show(rows):
        by_mode = itertools.groupby(sorted(rows, key=lambda row: (row.mode, row.kind, row.value)), lambda row: row.mode)
        for _, some in by_mode:
            print(harness.table(list(some), ("density", "error", "error_p99", "unheld", "psnr", "ssim")), end="\n\n")
        print(against_uniform(rows))

    harness.run("tolerance", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, tolerance)
