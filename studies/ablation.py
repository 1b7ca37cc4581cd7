"""Every `rectify` mode at several sparsities and orders on the demo model: single attention calls and whole clips
against full attention.

    python -m studies.ablation --split dev --batch 8 --order gilbert --order content
    torchrun --nproc-per-node 4 -m studies.ablation ...      # the pairs shared out; one GPU is enough
    python -m studies.ablation --table-of studies/data/ablation-held-out.csv [--plot ablation.png]

The attention columns are means over all layers at a quarter, half and three quarters of the steps.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from matplotlib.figure import Figure

from rectified_spaattn import SparseConfig
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.clips.clip import Mode, full_mode, generate
from rectified_spaattn.lab.clips.intervals import bootstrap
from rectified_spaattn.lab.clips.metrics import psnr, ssim
from rectified_spaattn.lab.option import option
from rectified_spaattn.lab.pages.styles import LINES, colour, label

from . import harness
from .allocation import allocation, exact
from .harness import EXACT

FLOOR = "full attention, math kernel"
FLOOR_SETTING = (0.0, FLOOR, "")
ATTENTION = ("attention_error", "mass_error", "block_mass_error", "kept_mass")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.7, 0.8, 0.9, 0.95))
    rectify: tuple[str, ...] = option("Modes.", tuple(RECTIFY))
    order: tuple[str, ...] = option("How tokens are put in blocks.", ("gilbert",))
    block_size: int = option("Tokens a block.", EXACT.block_size)
    top_p: float = option("Least attention mass the kept blocks hold.", EXACT.top_p)
    neighbours: bool = option("Always keep blocks that touch in 3-D.", EXACT.neighbours)
    backend: str = option("Attention backend, or auto.", "auto")
    plot: Path | None = option("PNG file for a figure of the table.", None)

    @property
    def configs(self) -> list[SparseConfig]:
        base = EXACT.replace(block_size=self.block_size, top_p=self.top_p, neighbours=self.neighbours)
        settings = itertools.product(self.sparsity, self.order, self.rectify)
        return [base.replace(sparsity=each, order=order, rectify=mode) for each, order, mode in settings]


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One pair under one mode; see Allocation for the attention columns."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "rectify", "order")
    split: str
    sparsity: float
    rectify: str
    order: str
    backend: str
    density: float
    attention_error: float
    mass_error: float
    block_mass_error: float
    kept_mass: float
    psnr: float
    ssim: float


def attention(pipe: Any, pairs: Any, options: Options) -> dict[tuple[Any, SparseConfig], list[float]]:
    """ATTENTION of every pair and config, means over the calls of a full-attention run."""
    on_calls = defaultdict(list)
    steps = (options.steps // 4, options.steps // 2, options.steps * 3 // 4)
    for call in options.calls(pipe, pairs, steps):
        full = {}
        for config in options.configs:
            if config.order not in full:
                full[config.order] = exact(call, config)
            measured = allocation(full[config.order], config, backend=options.backend)
            columns = (measured.relative_error, *(getattr(measured, name) for name in ATTENTION[1:]))
            for pair, values in zip(pairs, zip(*(each.tolist() for each in columns), strict=True), strict=True):
                on_calls[pair, config].append(values)
    return {place: [fmean(column) for column in zip(*calls, strict=True)] for place, calls in on_calls.items()}


def ablation(options: Options, study: str = "ablation") -> None:
    """Every rectify mode at several sparsities and orders. study: what harness.run is told."""
    modes = [Mode(name="floor", label=FLOOR, kernel="math")]
    for config in options.configs:
        name = f"{config.rectify}-{config.order}-{config.sparsity:g}"
        modes.append(Mode(name=name, label=config.rectify, configs=(config,)))

    def measure(pipe, pairs, say):
        say("attention calls")
        means = attention(pipe, pairs, options)
        say("clips, full attention")
        full = generate(pipe, full_mode(), pairs, options.arguments)
        for mode in modes:
            say(f"clips, {mode.label}")
            config = mode.config
            setting = (config.sparsity, config.rectify, config.order) if config else FLOOR_SETTING
            clips = generate(pipe, mode, pairs, options.arguments, backend=options.backend)
            for pair, clip, reference in zip(pairs, clips, full, strict=True):
                yield Row(
                    prompt=pair.prompt,
                    seed=pair.seed,
                    split=options.split,
                    **dict(zip(Row.KEYS, setting, strict=True)),
                    backend=clip.backend,
                    density=clip.density,
                    psnr=psnr(clip.video[None], reference.video[None]).item(),
                    ssim=ssim(clip.video[None], reference.video[None]).item(),
                    **dict(zip(ATTENTION, means.get((pair, config), [math.nan] * len(ATTENTION)), strict=True)),
                )

    def show(rows):
        first_order = next((row.order for row in rows if row.order), "")
        measures = ("density", *ATTENTION[:3], "psnr", "ssim")
        print(harness.table(rows, measures, {"rectify": "none", "order": first_order}, ("psnr", "ssim")))
        print("\nworst to best; < where the interval of the paired difference excludes 0, ~ where not")
        print(ranks(rows))
        if options.plot is not None:
            plot(rows, options.plot)

    harness.run(study, Row, options, measure, show)


def ranks(rows: list[Row]) -> str:
    """Per sparsity, the modes from worst to best."""
    lines = []
    by_setting = harness.settings_of(rows)
    sparsities = dict.fromkeys(setting[0] for setting in by_setting if setting != FLOOR_SETTING)
    for sparsity, name in itertools.product(sparsities, ("attention_error", "mass_error", "psnr", "ssim")):
        sign = 1 if name in ("psnr", "ssim") else -1
        mine = {", ".join(key[1:]): of_pair for key, of_pair in by_setting.items() if key[0] == sparsity}
        ranked = sorted(mine, key=lambda mode: sign * fmean(getattr(row, name) for row in mine[mode].values()))
        words = [ranked[0]]
        for worse, better in itertools.pairwise(ranked):
            gain = bootstrap([sign * each for each in harness.differences(mine[better], mine[worse], name)])
            words += ["<" if gain.low > 0 else "~", better]
        lines.append(f"{sparsity:.0%} {name.replace('_', ' ')}: {' '.join(words)}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Attention error, mass error, PSNR and SSIM against sparsity, one line a mode, with the intervals of the table."""
    titles = {
        "attention_error": "output error of an attention call (lower is better)",
        "mass_error": "mass error (lower is better)",
        "psnr": "PSNR to full attention, dB (higher is closer)",
        "ssim": "SSIM to full attention (higher is closer)",
    }
    by_setting = {key: of_pair for key, of_pair in harness.settings_of(rows).items() if key != FLOOR_SETTING}
    sparsities = sorted({key[0] for key in by_setting})
    modes = list(dict.fromkeys(key[1:] for key in by_setting))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        for place, mode in enumerate(modes):
            measured = {s: by_setting[s, *mode].values() for s in sparsities if (s, *mode) in by_setting}
            means = [bootstrap([getattr(row, name) for row in some]) for some in measured.values()]
            aside = 1.75 / len(modes) * (place - (len(modes) - 1) / 2)  # bars do not hide one another
            bars = [[each.mean - each.low for each in means], [each.high - each.mean for each in means]]
            axis.errorbar(
                [100 * s + aside for s in measured], [each.mean for each in means], yerr=bars, marker="o", markersize=4,
                color=colour(mode[0], place), linestyle=LINES[mode[1]], capsize=3, label=label(*mode),
            )  # fmt: skip
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xticks([100 * s for s in sparsities], [f"{s:.0%}" for s in sparsities])
        axis.spines[["top", "right"]].set_visible(False)
    lines = axis.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(len(modes), 5), frameon=False)
    pairs = len({row.pair for row in rows})
    figure.suptitle(f"{rows[0].split}: {pairs} prompt-seed pairs, 95% intervals", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    harness.main(Options, ablation)
