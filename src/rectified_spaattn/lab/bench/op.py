"""The operator against dense attention on one shape: check, time, and make rows."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...attention import rectified_attention
from ...backends import BACKENDS
from ..option import option
from .baselines import BASELINES, compared_with
from .check import Check, check_dense, check_sample, check_small
from .rows import Row, StageRow, case_columns, config_columns
from .settings import FEWEST_REPEATS, BenchSettings, check_names, runnable
from .shapes import DTYPES, MODEL_SHAPES, SHAPES, Case, Tensors, Variant, Watch
from .stages import stages_of
from .timing import Timed, Timing, extra_memory, input_sets, interleaved

BACKEND_NAMES = tuple(name for name in BACKENDS if name != "reference")  # the oracle is not timed
_SLOW_ON_GPUS = ("torch",)  # a third of the repeats


@dataclass(frozen=True, kw_only=True)
class OpSettings(BenchSettings):
    """One run. Raises ValueError or TypeError for values out of range.

    baseline, backend: empty for every one that can run; one that is named and cannot is an error.
    """

    shape: tuple[str, ...] = option("May be repeated.", (), choices=tuple(SHAPES), unset="hunyuan-video")
    all_shapes: bool = option("The shapes of all models.", False)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.5, 0.7, 0.8, 0.8895, 0.95))
    backend: tuple[str, ...] = option("May be repeated.", (), choices=BACKEND_NAMES, unset="all that can run")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("shape", self.shape, tuple(SHAPES))
        check_names("backend", self.backend, BACKEND_NAMES)
        if self.all_shapes and self.shape:
            raise ValueError("--all-shapes: got --shape, too; allowed: one of the two.")
        if not self.sparsity:
            raise ValueError("sparsity: got none; allowed: one or more.")
        for name in self.shapes:
            size = self.config().block_size
            if SHAPES[name].small().video // size < 2:
                raise ValueError(f"block_size: got {size}; allowed for {name}: one that gives two blocks.")

    @property
    def shapes(self) -> tuple[str, ...]:
        return MODEL_SHAPES if self.all_shapes else self.shape or ("hunyuan-video",)

    def cases(self) -> list[Case]:
        """Raises BenchError where a GPU is asked for and there is none."""
        device = self.where()
        return [Case(SHAPES[name], self.config(), DTYPES[self.dtype], device) for name in self.shapes]


class OpResult(NamedTuple):
    """What came of one shape; rows hold what could not run, too."""

    checks: list[Check]
    rows: list[Row]
    stages: list[StageRow]


def measure(case: Case, settings: OpSettings, watch: Watch) -> OpResult:
    """Checks everything, then times everything in one interleaved loop, then the stages.

    Raises BenchError, before anything is timed, where a result is wrong or something asked for cannot run.
    """
    shape = case.shape
    reasons = {name: baseline.why_not(case) for name, baseline in BASELINES.items()}
    baselines, no_baselines = runnable("baseline", settings.baseline, reasons, shape.name)
    reasons = {name: BACKENDS[name].why_not(case.call()) for name in BACKEND_NAMES}
    backends, no_backends = runnable("backend", settings.backend, reasons, shape.name)
    dense = [Variant("dense", name) for name in baselines]
    sparse = [Variant("sparse", name, sparsity) for name in backends for sparsity in sorted(settings.sparsity)]
    with torch.inference_mode():
        checks, densities, stages = [], {}, []
        for number, name in enumerate((*baselines, *backends)):
            watch(f"{shape.name}: checking {name}", number, len(baselines) + len(backends))
            checks += [check_dense(case, name)] if number < len(baselines) else check_small(case, name)
        sets, sampling = _inputs(case), torch.Generator().manual_seed(0)
        for number, each in enumerate(sparse):
            watch(f"{shape.name}: checking {each} at full size", number, len(sparse))
            more, densities[each] = check_sample(case, each, sets[0], sampling)
            checks += more
        calls = {each: _timed(each, case, sets, settings.repeats) for each in (*dense, *sparse)}
        times = interleaved(calls, len(sets), case.device, partial(watch, f"{shape.name}: timing"))
        extra = {each: extra_memory(partial(timed.call, 0), case.device) for each, timed in calls.items()}
        for each in sparse:
            stages += _stage_rows(each, case, sets[0], settings.repeats, times[each], watch)

    against = compared_with(baselines)
    dense_ms = times[Variant("dense", against)].median
    rows = []
    for each, timing in times.items():
        density = densities.get(each, 1.0)
        operations = 4 * shape.tokens**2 * shape.heads * shape.head_dim * density
        rows.append(
            Row(
                shape=shape.name,
                **case_columns(case, each),
                **timing.columns(),
                density=density,
                ideal=1 / density,
                input_sets=len(sets),
                dense=against,
                dense_ms=dense_ms,
                ratio=dense_ms / timing.median,
                tflops=operations / timing.median / 1e9,  # per ms to 10^12 per s
                extra_bytes=extra[each],
            )
        )
    unable = [("dense", *each) for each in no_baselines.items()] + [("sparse", *each) for each in no_backends.items()]
    rows += [Row(shape=shape.name, **case_columns(case, Variant(kind, n)), not_run=why) for kind, n, why in unable]
    return OpResult(checks, rows, stages)


def _inputs(case: Case) -> list[Tensors]:
    size = 3 * case.shape.tokens * case.shape.heads * case.shape.head_dim * case.dtype.itemsize
    return case.inputs(1, input_sets(size, case.device))


def _timed(variant: Variant, case: Case, sets: list[Tensors], repeats: int) -> Timed:
    if variant.sparsity is None:
        run = BASELINES[variant.name].run
        return Timed(lambda i: run(*sets[i]), repeats)
    if case.device.type == "cuda" and variant.name in _SLOW_ON_GPUS:
        repeats = max(FEWEST_REPEATS, repeats // 3)
    layout, config = case.layout(), case.config_of(variant)
    return Timed(lambda i: rectified_attention(*sets[i], layout, config, backend=variant.name), repeats)


def _stage_rows(
    variant: Variant, case: Case, qkv: Tensors, repeats: int, whole: Timing, watch: Watch
) -> list[StageRow]:
    """The stages one by one, each again and again on the same intermediate results."""
    if variant.sparsity is None:
        return []
    config = case.config_of(variant)
    stages = stages_of(variant.name, case._replace(config=config), qkv)
    calls = {name: Timed(lambda _, run=run: run(), repeats) for name, run in stages.items()}  # type: ignore[misc]
    times = interleaved(calls, 1, case.device, partial(watch, f"{case.shape.name}: stages of {variant.name}"))
    total = sum(timing.median for timing in times.values())
    return [
        StageRow(
            shape=case.shape.name,
            backend=variant.name,
            sparsity=variant.sparsity,
            **config_columns(config),
            stage=stage,
            **timing.columns(),
            share=timing.median / total,
            whole_ms=whole.median,
        )
        for stage, timing in times.items()
    ]
