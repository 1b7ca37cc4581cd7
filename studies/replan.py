"""Plans that live for several steps: what old orders and old block lists cost in quality, and what they save in time.

    python -m studies.replan --pairs 8 --device cuda --batch 8 --dtype bfloat16 --shape hunyuan-video
    python -m studies.replan --table-of studies/data/replan-dev.csv --plot docs/images/replan.png

`error` is of single attention calls, |out - full| / |full| over the video tokens, mean over all captured steps and
layers of a run with full attention; every call takes the plan that it would take in a run. PSNR and SSIM are of whole
clips. `ms` is of one call at `--shape` on normal numbers, mean over the steps that share a plan: (planned + (n - 1)
kept) / n. `bytes` is what plans held at most, of the whole batch. A replan of as many steps as there are plans once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure

from rectified_spaattn.config import ORDERS, RECTIFY, SparseConfig
from rectified_spaattn.kept_plans import KeptPlans, Moment
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.lab.bench.timing import Timed, durations, input_sets, time_columns
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.lab.clips.clip import Mode, full_mode, generate
from rectified_spaattn.lab.clips.intervals import bootstrap
from rectified_spaattn.lab.clips.metrics import psnr, ssim
from rectified_spaattn.lab.machine import device_of
from rectified_spaattn.lab.option import option
from rectified_spaattn.lab.pages.styles import MARKERS, colour

from . import harness

KEPT = {"orders": False, "orders and lists": True}
FOR_EVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.9,))
    replan: tuple[int, ...] = option("Steps that a plan lives.", (1, 2, 3, 4, 6, 8, 12))
    kept: tuple[str, ...] = option("What is kept.", tuple(KEPT), choices=tuple(KEPT))
    rectify: str = option("Mode.", SparseConfig().rectify, choices=tuple(RECTIFY))
    order: str = option("How tokens are put in blocks.", "content", choices=ORDERS)
    block_size: int = option("Tokens a block, of clips and captured calls.", harness.EXACT.block_size)
    top_p: float = option("Least attention mass the kept blocks hold.", harness.EXACT.top_p)
    shape: str = option("Shape of the call that is timed, in blocks of 128 (tiny: 64).", "tiny", choices=tuple(SHAPES))
    repeats: int = option("Rounds of the timing.", 10)
    backend: str = option("Attention backend, or auto.", "auto")
    plot: Path | None = option("PNG file for a figure of the table.", None)

    @property
    def base(self) -> SparseConfig:
        return SparseConfig(rectify=self.rectify, order=self.order, block_size=self.block_size, top_p=self.top_p)  # type: ignore[arg-type]

    @property
    def settings(self) -> Iterator[tuple[float, str, int, SparseConfig]]:
        """Sparsity, what is kept, for how many steps, and the config; that of 1 once, for all kinds alike."""
        for sparsity in self.sparsity:
            for kept in self.kept:
                for replan in self.replan:
                    if replan > 1 or kept == self.kept[0]:
                        config = self.base.replace(sparsity=sparsity, replan=replan, kept_lists=KEPT[kept])
                        yield sparsity, kept, replan, config


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One pair under one setting; ms, backend and shape are of the timed call, the same for all pairs."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "kept", "replan")
    sparsity: float
    kept: str
    replan: int
    error: float
    psnr: float
    ssim: float
    density: float
    bytes: int
    ms: float
    shape: str


def errors(
    calls: Iterable[AttentionCall], configs: Sequence[SparseConfig], total: int, backend: str, dtype: torch.dtype
) -> list[float]:
    """Mean error of the calls of one run under every config, by the plans that it would keep, in dtype."""
    plans = [KeptPlans() for _ in configs]
    sums, count = [0.0] * len(configs), 0
    for call in sorted(calls, key=lambda call: call.step):
        full, count = full_attention(call)[:, call.video], count + 1
        q, k, v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
        moment = Moment(layer=call.layer, branch=None, step=call.step, total=total)
        for i, config in enumerate(configs):
            options = {"text_mask": call.text_mask, "backend": backend}
            out, _ = plans[i].attention(q, k, v, call.layout, config, moment, **options)
            sums[i] += ((out[:, call.video].float() - full).norm() / full.norm()).item()
    return [each / count for each in sums]


def times(options: Options, device: torch.device) -> dict[tuple[float, str], tuple[float, float]]:
    """Milliseconds of a call that plans, and of one that takes what is kept, by sparsity and what is kept; medians."""
    size = 64 if options.shape == "tiny" else 128
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = Case(SHAPES[options.shape], options.base.replace(block_size=size), dtype, device)
    sets = case.inputs(1, input_sets(3 * case.inputs(0)[0][0].nbytes, device))
    layout, calls = case.layout(), {}
    for sparsity in options.sparsity:
        config = case.config.replace(sparsity=sparsity)
        for kept in ("", *options.kept):
            own = config.replace(replan=FOR_EVER, kept_lists=KEPT[kept]) if kept else config
            calls[sparsity, kept] = _timed(sets, layout, own, options)
    seconds = durations(calls, len(sets), device, lambda done, total: None)
    ms = {name: time_columns("ms", [1000 * each for each in some])["ms"] for name, some in seconds.items()}
    return {(sparsity, kept): (ms[sparsity, ""], ms[sparsity, kept]) for sparsity, kept in ms if kept}


def _timed(sets: Sequence[Any], layout: Any, config: SparseConfig, options: Options) -> Timed:
    plans = KeptPlans()
    attend = partial(plans.attention, layout=layout, config=config, backend=options.backend)
    moments = [Moment(layer=0, branch=None, step=step, total=None) for step in (0, 1)]
    q, k, v = sets[0]
    attend(q, k, v, moment=moments[0])

    def call(i: int) -> None:
        q, k, v = sets[i]
        attend(q, k, v, moment=moments[1])

    return Timed(call, options.repeats)


def replan(options: Options) -> None:
    """Old orders and lists: their quality and their time."""
    settings = list(options.settings)
    configs = [config for *_, config in settings]
    ms: dict[tuple[float, str], tuple[float, float]] = {}

    def measure(pipe, pairs, say):
        if not ms:
            say(f"timing at {options.shape}")
            ms.update(times(options, device_of(options.device)))
        of_pair = {}
        for pair in pairs:
            say(f"attention calls, {pair.prompt[:30]}")
            calls = options.calls(pipe, [pair], range(options.steps))
            of_pair[pair] = errors(calls, configs, options.steps, options.backend, getattr(torch, options.dtype))
        say("clips, full attention")
        full = generate(pipe, full_mode(), pairs, options.arguments)
        for i, (sparsity, kept, steps, config) in enumerate(settings):
            say(f"clips, {kept} for {steps}")
            how = Mode(name=f"{kept.replace(' ', '-')}-{steps}", label=kept, configs=(config,))
            clips = generate(pipe, how, pairs, options.arguments, backend=options.backend)
            planned, taken = ms[sparsity, kept]
            for pair, clip, reference in zip(pairs, clips, full, strict=True):
                assert clip.stats is not None
                yield Row(
                    prompt=pair.prompt,
                    seed=pair.seed,
                    sparsity=sparsity,
                    kept=kept,
                    replan=steps,
                    error=of_pair[pair][i],
                    psnr=psnr(clip.video[None], reference.video[None]).item(),
                    ssim=ssim(clip.video[None], reference.video[None]).item(),
                    density=clip.density,
                    bytes=clip.stats.plan_bytes_peak,
                    ms=(planned + (steps - 1) * taken) / steps,
                    shape=options.shape,
                )

    def show(rows):
        first = {"kept": rows[0].kept, "replan": 1}
        print(harness.table(rows, ("error", "psnr", "ssim", "density", "bytes", "ms"), first, ("error", "psnr")))
        if options.plot is not None:
            plot(rows, options.plot)

    harness.run("replan", Row, options, measure, show)


def points(rows: Sequence[Row]) -> dict[tuple[float, str], list[tuple[int, float, Sequence[Row]]]]:
    """(sparsity, what is kept) -> (steps, ms, rows) by rising steps; what plans in every call begins every line."""
    by_setting = {key: list(some.values()) for key, some in harness.settings_of(rows).items()}
    lines: dict[tuple[float, str], list[tuple[int, float, Sequence[Row]]]] = {}
    for sparsity, kept in dict.fromkeys(key[:2] for key in by_setting):
        mine = {
            key[2]: some for key, some in by_setting.items() if key[0] == sparsity and (key[1] == kept or key[2] == 1)
        }
        lines[sparsity, kept] = [(steps, mine[steps][0].ms, mine[steps]) for steps in sorted(mine)]
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """PSNR and error against milliseconds of a call, a line a kind, points named by the steps that a plan lives."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    names = {"psnr": "PSNR to full attention, dB (higher is closer)", "error": "error of a call (lower is better)"}
    for axis, (name, title) in zip(figure.subplots(1, 2).flat, names.items(), strict=True):
        for marker, ((sparsity, kept), line) in zip(MARKERS, points(rows).items(), strict=False):
            means = [bootstrap([getattr(row, name) for row in some]) for *_, some in line]
            bars = [[each.mean - each.low for each in means], [each.high - each.mean for each in means]]
            label = f"{kept}, {sparsity:.4g} sparse"
            x, y = [ms for _, ms, _ in line], [each.mean for each in means]
            drawn = {"marker": marker, "color": colour(SparseConfig().rectify)}
            axis.errorbar(x, y, yerr=bars, markersize=4, capsize=3, label=label, **drawn)
            for (steps, ms, _), mean in zip(line, y, strict=True):
                axis.annotate(f"{steps}", (ms, mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"milliseconds of a call, {rows[0].shape}")
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    pairs = len({row.pair for row in rows})
    figure.suptitle(f"Steps that a plan lives: {pairs} prompt-seed pairs, 95% intervals", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    harness.main(Options, replan)
