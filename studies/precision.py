"""Kept blocks in 8 bits: what that costs in quality, and what it saves in time.

    python -m studies.precision --pairs 8 --batch 8 --device cuda --dtype bfloat16 --shape hunyuan-video
    python -m studies.precision --table-of studies/data/precision-dev.csv

`error` is of single attention calls, |out - full| / |full| over the video tokens, mean over the captured calls; `apart`
is |out - out16| / |out16|, with out16 the same call in the inputs' precision, with the same order and the same blocks;
`psnr` is of whole clips against full attention. `ms` is of one whole call at `--shape` on normal numbers, planning
counted, and `apart_there` what `apart` is on those. Backend triton throughout.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch

from rectified_spaattn import rectified_attention
from rectified_spaattn.config import RECTIFY, Precision, SparseConfig
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.lab.bench.timing import Timed, durations, input_sets, time_columns
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.lab.clips.clip import Mode, full_mode, generate
from rectified_spaattn.lab.clips.metrics import psnr
from rectified_spaattn.lab.machine import device_of
from rectified_spaattn.lab.option import option

from . import harness

PRECISIONS: tuple[Precision, ...] = ("inputs", "int8-qk", "fp8")
BACKEND = "triton"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.8, 0.9))
    mode: tuple[str, ...] = option("Modes.", ("query+slope", "ipar+gapr"), choices=tuple(RECTIFY))
    shape: str = option("Shape of the call that is timed, in blocks of 128.", "hunyuan-video", choices=tuple(SHAPES))
    repeats: int = option("Rounds of the timing.", 10)

    @property
    def settings(self) -> Iterator[tuple[str, float, str, SparseConfig]]:
        """Mode, sparsity, precision and the config; the paper's mode on blocks along the curve."""
        for mode in self.mode:
            base = harness.EXACT.replace(rectify=mode)
            base = base.replace(order="content") if base.rule.tail else base
            for sparsity in self.sparsity:
                for precision in PRECISIONS:
                    yield mode, sparsity, precision, base.replace(sparsity=sparsity, precision=precision)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One pair under one setting; ms, apart_there and shape are of the timed call, the same for all pairs."""

    KEYS: ClassVar[tuple[str, ...]] = ("mode", "sparsity", "precision")
    mode: str
    sparsity: float
    precision: str
    error: float
    apart: float
    psnr: float
    ms: float
    ms_q1: float
    ms_q3: float
    apart_there: float
    shape: str


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def both(qkv: Any, layout: Any, config: SparseConfig, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output in the config's precision, and in the inputs' with the same order and the same blocks."""
    out, stats = rectified_attention(*qkv, layout, config, backend=BACKEND, return_stats=True, **options)
    same = {"block_mask": stats.block_mask, "token_order": stats.token_order}
    return out, rectified_attention(
        *qkv, layout, config.replace(precision="inputs"), backend=BACKEND, **same, **options
    )


def errors(calls: Iterable[AttentionCall], config: SparseConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Mean error to full attention, and mean distance to the inputs' precision, of calls that are cast to dtype."""
    to_full, to_inputs = [], []
    for call in calls:
        full = full_attention(call)[:, call.video]
        qkv = (call.q.to(dtype), call.k.to(dtype), call.v.to(dtype))
        out, plain = both(qkv, call.layout, config, text_mask=call.text_mask)
        to_full.append(apart(out[:, call.video], full))
        to_inputs.append(apart(out[:, call.video], plain[:, call.video]))
    return fmean(to_full), fmean(to_inputs)


def times(options: Options, device: torch.device) -> dict[tuple[str, float, str], tuple[dict[str, float], float]]:
    """Milliseconds of whole calls in one shuffled loop, and how far their outputs are from the inputs' precision."""
    case = Case(SHAPES[options.shape], SparseConfig(), getattr(torch, options.dtype), device)
    sets, layout = case.inputs(1, input_sets(3 * case.inputs(0)[0][0].nbytes, device)), case.layout()
    calls, there = {}, {}
    for mode, sparsity, precision, config in options.settings:
        config = config.replace(block_size=128)
        attend = partial(rectified_attention, layout=layout, config=config, backend=BACKEND)
        calls[mode, sparsity, precision] = Timed(lambda i, attend=attend: attend(*sets[i]), options.repeats)
        there[mode, sparsity, precision] = apart(*both(sets[0], layout, config))
    seconds = durations(calls, len(sets), device, lambda done, total: None)
    return {name: (time_columns("ms", [1000 * each for each in some]), there[name]) for name, some in seconds.items()}


def precision(options: Options) -> None:
    """8 bits: their quality and their time."""
    ms: dict[tuple[str, float, str], tuple[dict[str, float], float]] = {}

    def measure(pipe, pairs, say):
        if not ms:
            say(f"timing at {options.shape}")
            ms.update(times(options, device_of(options.device)))
        calls = {pair: list(options.calls(pipe, [pair])) for pair in pairs}
        full = generate(pipe, full_mode(), pairs, options.arguments)
        for mode, sparsity, kind, config in options.settings:
            say(f"{mode}, {kind}")
            how = Mode(name=f"{mode}-{kind}", label=mode, configs=(config,))
            clips = generate(pipe, how, pairs, options.arguments, backend=BACKEND)
            took, there = ms[mode, sparsity, kind]
            for pair, clip, reference in zip(pairs, clips, full, strict=True):
                error, distance = errors(calls[pair], config, getattr(torch, options.dtype))
                yield Row(
                    prompt=pair.prompt,
                    seed=pair.seed,
                    mode=mode,
                    sparsity=sparsity,
                    precision=kind,
                    error=error,
                    apart=distance,
                    psnr=psnr(clip.video[None], reference.video[None]).item(),
                    ms=took["ms"],
                    ms_q1=took["ms_q1"],
                    ms_q3=took["ms_q3"],
                    apart_there=there,
                    shape=options.shape,
                )

    def show(rows):
        first = {"mode": rows[0].mode, "precision": PRECISIONS[0]}
        columns = ("error", "apart", "psnr", "ms", "ms_q1", "ms_q3", "apart_there")
        print(harness.table(rows, columns, first, ("error", "psnr")))

    harness.run("precision", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, precision)
