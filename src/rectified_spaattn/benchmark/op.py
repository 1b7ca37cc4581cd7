"""The operator against dense attention on one shape: check, time, and make rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..attention import rectified_attention
from ..backends import BACKENDS, Call
from ..config import Rectify
from ..device import device_of
from .baselines import BASELINES, compared_with
from .check import BenchError, Checked, check_dense, check_sample, check_small, config_at
from .record import Row, StageRow
from .shapes import SHAPES, Case
from .timing import Timed, Timing, extra_memory, ignoring_set, input_sets, interleaved

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SLOW_ON_GPUS = ("torch",)  # a third of the repeats
_FEWEST_REPEATS = 3

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Watch = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclass(frozen=True, kw_only=True)
class OpSettings:
    """One run. Raises ValueError for values out of range.

    baselines, backends: empty for every one that can run; one that is named and cannot is an error.
    repeats: rounds counted, after those of the warm-up.
    """

    shapes: tuple[str, ...] = ("hunyuan-video",)
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.8895, 0.95)
    baselines: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    block_size: int = 128
    rectify: Rectify = "ipar+gapr"
    order: str = "gilbert"
    dtype: str = "bfloat16"
    repeats: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        check_names("shape", self.shapes, tuple(SHAPES))
        check_names("baseline", self.baselines, tuple(BASELINES))
        check_names("backend", self.backends, backend_names())
        check_names("dtype", (self.dtype,), tuple(DTYPES))
        check_names("device", (self.device,), ("auto", "cpu", "cuda"))
        if not self.shapes or not self.sparsities:
            raise ValueError("shapes, sparsities: got none; allowed: one or more of each.")
        if self.repeats < _FEWEST_REPEATS:
            raise ValueError(f"repeats: got {self.repeats}; allowed: {_FEWEST_REPEATS} or more.")
        if len(set(self.sparsities)) != len(self.sparsities):
            raise ValueError(f"sparsity: got {list(self.sparsities)}; allowed: values that differ.")
        for sparsity in self.sparsities:
            config_at(sparsity, self.rectify)
        for name in self.shapes:
            if SHAPES[name].small().layout(self.block_size, self.order).num_blocks < 2:
                raise ValueError(f"block_size: got {self.block_size}; allowed for {name}: one that gives two blocks.")

    def cases(self) -> list[Case]:
        """Raises BenchError where a GPU is asked for and there is none."""
        device = device_for(self.device, "Use cpu and a small shape.")
        dtype = DTYPES[self.dtype]
        return [Case(SHAPES[name], self.block_size, dtype, device, self.rectify, self.order) for name in self.shapes]


class Measured(NamedTuple):
    """What came of one shape; rows hold what could not run, too."""

    checks: list[Checked]
    rows: list[Row]
    stages: list[StageRow]


class _Sparse(NamedTuple):
    """A call that is timed."""

    backend: str
    sparsity: float

    @property
    def key(self) -> str:
        return f"{self.backend} {self.sparsity!r}"


def backend_names() -> tuple[str, ...]:
    """Every backend but the oracle."""
    return tuple(name for name in BACKENDS if name != "reference")


def runnable(case: Case) -> dict[str, str | None]:
    """Backend -> the reason why it cannot run this case, None where it can."""
    layout = case.layout()
    call = Call(case.device, case.dtype, case.shape.head_dim, case.block_size, layout.num_blocks)
    return {name: BACKENDS[name].why_not(call) for name in backend_names()}


def measure(case: Case, settings: OpSettings, watch: Watch) -> Measured:
    """Checks everything, then times everything in one interleaved loop, then the stages.

    Raises BenchError, before anything is timed, where a result is wrong or something asked for cannot run.
    """
    no_baseline = _chosen("baseline", settings.baselines, {n: b.why_not(case) for n, b in BASELINES.items()}, case)
    no_backend = _chosen("backend", settings.backends, runnable(case), case)
    baselines = [name for name, reason in no_baseline.items() if reason is None]
    sparse = [_Sparse(name, s) for name, reason in no_backend.items() if reason is None for s in settings.sparsities]
    with torch.inference_mode():
        checks = _check_small(case, baselines, list(dict.fromkeys(each.backend for each in sparse)), watch)
        sets = _inputs(case)
        found, densities = _check_full(case, sparse, sets[0], watch)
        calls = {name: Timed(_dense_call(name, sets), settings.repeats) for name in baselines}
        calls |= {each.key: Timed(_sparse_call(each, case, sets), _repeats(each, case, settings)) for each in sparse}
        times = interleaved(calls, len(sets), case.device, partial(watch, f"{case.shape.name}: timing"))
        extra = {name: extra_memory(partial(timed.call, 0), case.device) for name, timed in calls.items()}
        stages = _time_stages(case, settings, sparse, sets[0], times, watch)

    common = _common(case)
    against = compared_with(baselines)
    row = partial(_row, common, len(sets), against, times[against])
    rows = [row("dense", name, None, 1.0, times[name], extra[name]) for name in baselines]
    rows += [
        row("sparse", each.backend, each.sparsity, densities[each.key], times[each.key], extra[each.key])
        for each in sparse
    ]
    rows += [_not_run(common, "dense", name, reason) for name, reason in no_baseline.items() if reason is not None]
    rows += [_not_run(common, "sparse", name, reason) for name, reason in no_backend.items() if reason is not None]
    return Measured([*checks, *found], rows, stages)


def _chosen(kind: str, asked: tuple[str, ...], reasons: dict[str, str | None], case: Case) -> dict[str, str | None]:
    """The names asked for, or all of them, with the reasons. Raises BenchError where one asked for, or all, cannot."""
    for name in asked:
        if reasons[name] is not None:
            can = [each for each, reason in reasons.items() if reason is None]
            raise BenchError(f"{kind} {name}: {reasons[name]}; allowed for {case.shape.name} here: {can}.")
    chosen = {name: reason for name, reason in reasons.items() if not asked or name in asked}
    if all(reason is not None for reason in chosen.values()):
        told = "; ".join(f"{name}: {reason}" for name, reason in chosen.items())
        raise BenchError(f"no {kind} can run {case.shape.name} here: {told}.")
    return chosen


def _check_small(case: Case, baselines: list[str], backends: list[str], watch: Watch) -> list[Checked]:
    checks, total = [], len(baselines) + len(backends)
    for done, name in enumerate(baselines):
        watch(f"{case.shape.name}: checking {name}", done, total)
        checks.append(check_dense(case, name))
    for done, name in enumerate(backends, start=len(baselines)):
        watch(f"{case.shape.name}: checking {name}", done, total)
        checks += check_small(case, name)
    return checks


def _check_full(
    case: Case, sparse: list[_Sparse], qkv: Tensors, watch: Watch
) -> tuple[list[Checked], dict[str, float]]:
    """Also the density of every call."""
    checks, densities = [], {}
    generator = torch.Generator().manual_seed(0)
    for done, each in enumerate(sparse):
        watch(f"{case.shape.name}: checking {each.backend} at full size", done, len(sparse))
        found, densities[each.key] = check_sample(case, each.backend, qkv, each.sparsity, generator)
        checks += found
    return checks, densities


def _inputs(case: Case) -> list[Tensors]:
    size = 3 * case.shape.tokens * case.shape.heads * case.shape.head_dim * case.dtype.itemsize
    generator = torch.Generator(case.device).manual_seed(1)
    return [case.inputs(generator) for _ in range(input_sets(size, case.device))]


def _dense_call(name: str, sets: list[Tensors]) -> Callable[[int], object]:
    run = BASELINES[name].run
    return lambda i: run(*sets[i])


def _sparse_call(each: _Sparse, case: Case, sets: list[Tensors]) -> Callable[[int], object]:
    layout, config = case.layout(), config_at(each.sparsity, case.rectify)
    return lambda i: rectified_attention(*sets[i], layout, config, backend=each.backend)


def _repeats(each: _Sparse, case: Case, settings: OpSettings) -> int:
    if case.device.type == "cuda" and each.backend in _SLOW_ON_GPUS:
        return max(_FEWEST_REPEATS, settings.repeats // 3)
    return settings.repeats


def _time_stages(
    case: Case,
    settings: OpSettings,
    sparse: list[_Sparse],
    qkv: Tensors,
    whole: Mapping[str, Timing],
    watch: Watch,
) -> list[StageRow]:
    """For the backends that offer their stages: dict of callables, each of which runs one stage again."""
    layout = case.layout()
    text_valid = torch.ones(1, case.shape.text, dtype=torch.bool, device=case.device)
    rows = []
    for each in sparse:
        offered = BACKENDS[each.backend].stages
        if offered is None:
            continue
        scale = case.shape.head_dim**-0.5
        stages = offered(*qkv, layout, config_at(each.sparsity, case.rectify), text_valid, scale)
        calls = {stage: Timed(ignoring_set(run), settings.repeats) for stage, run in stages.items()}
        tell = partial(watch, f"{case.shape.name}: stages of {each.backend}")
        times = interleaved(calls, 1, case.device, tell)
        total = sum(timing.median for timing in times.values())
        rows += [
            StageRow(
                shape=case.shape.name,
                backend=each.backend,
                rectify=case.rectify,
                order=case.order,
                sparsity=each.sparsity,
                stage=stage,
                **_milliseconds(timing),
                share=timing.median / total,
                whole_ms=whole[each.key].median,
            )
            for stage, timing in times.items()
        ]
    return rows


def _milliseconds(timing: Timing) -> dict[str, Any]:
    ms = {"ms": timing.median, "ms_q1": timing.q1, "ms_q3": timing.q3, "ms_min": timing.low, "ms_max": timing.high}
    return {**ms, "repeats": timing.repeats}


def _common(case: Case) -> dict[str, Any]:
    return {
        "shape": case.shape.name,
        "tokens": case.shape.tokens,
        "heads": case.shape.heads,
        "head_dim": case.shape.head_dim,
        "block_size": case.block_size,
        "rectify": case.rectify,
        "order": case.order,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def _row(
    common: dict[str, Any],
    sets: int,
    against: str,
    dense: Timing,
    kind: str,
    name: str,
    sparsity: float | None,
    density: float,
    timing: Timing,
    extra: int | None,
) -> Row:
    operations = 4 * common["tokens"] ** 2 * common["heads"] * common["head_dim"] * density
    return Row(
        **common,
        kind=kind,
        name=name,
        sparsity=sparsity,
        density=density,
        ideal=1 / density,
        **_milliseconds(timing),
        input_sets=sets,
        dense=against,
        dense_ms=dense.median,
        ratio=dense.median / timing.median,
        tflops=operations / timing.median / 1e9,  # per ms to 10^12 per s
        extra_bytes=extra,
    )


def _not_run(common: dict[str, Any], kind: str, name: str, reason: str) -> Row:
    return Row(**common, kind=kind, name=name, not_run=reason)


def check_names(what: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a name that is not allowed or comes twice."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"{what}: got {name!r}; allowed: one of {list(allowed)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"{what}: got {list(names)}; allowed: names that differ.")


def device_for(asked: str, instead: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda". Raises BenchError where a GPU is asked for and there is none."""
    try:
        return device_of(asked)
    except ValueError as error:
        raise BenchError(f"{error} {instead}") from error
