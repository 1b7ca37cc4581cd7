"""The operator against dense attention on one shape: check, time, and make rows."""

from functools import partial
from typing import NamedTuple

import torch

from ...attention import rectified_attention
from ...backends import BACKENDS
from .baselines import BASELINES, compared_with, sdpa
from .check import Check, check_dense, check_eight_bits, check_sample, check_small
from .peers import PEERS, Prepared, relative_error
from .rows import Row, StageRow, case_columns, config_columns
from .settings import FEWEST_REPEATS, TIMED_BACKENDS, OpSettings, runnable
from .shapes import BenchError, Case, Tensors, Variant, Watch
from .stages import stages_of
from .timing import Timed, durations, extra_memory, input_sets, time_columns

_SLOW_ON_GPUS = ("torch",)  # a third of the repeats


class OpResult(NamedTuple):
    """What came of one shape; rows hold what could not run, too."""

    checks: list[Check]
    rows: list[Row]
    stages: list[StageRow]


@torch.inference_mode()
def measure(case: Case, settings: OpSettings, watch: Watch) -> OpResult:
    """Checks everything, then times everything in one interleaved loop, then the stages.

    Raises BenchError, before anything is timed, where a result is wrong or something asked for cannot run.
    """
    shape, device = case.shape, case.device
    reasons = {name: baseline.why_not(case) for name, baseline in BASELINES.items()}
    baselines, no_baselines = runnable("baseline", settings.baseline, reasons, shape.name)
    reasons = {name: BACKENDS[name].why_not(case.call()) for name in TIMED_BACKENDS}
    backends, no_backends = runnable("backend", settings.backend, reasons, shape.name)
    if settings.peer:
        runnable("peer", settings.peer, {name: peer.why_not(case) for name, peer in PEERS.items()}, shape.name)
    able, unable = _precisions(case, settings, backends)
    sparse = [each._replace(sparsity=sparsity) for each in able for sparsity in sorted(settings.sparsity)]
    peers = [each for name in settings.peer for each in PEERS[name].variants(name, settings.sparsity)]
    variants = [*(Variant("dense", name) for name in baselines), *sparse, *peers]
    checks, densities, stages = [], {}, []
    for number, name in enumerate((*baselines, *backends)):
        watch(f"{shape.name}: checking {name}", number, len(baselines) + len(backends))
        checks += [check_dense(case, name)] if number < len(baselines) else check_small(case, name)
    size = 3 * shape.tokens * shape.heads * shape.head_dim * case.dtype.itemsize
    sets, sampling = case.inputs(1, input_sets(size, device)), torch.Generator().manual_seed(0)
    for number, each in enumerate(sparse):
        watch(f"{shape.name}: checking {each} at full size", number, len(sparse))
        check = check_sample if each.precision == "inputs" else check_eight_bits
        more, densities[each] = check(case, each, sets[0], sampling)
        checks += more
    errors = _errors(case, sparse, peers, watch)
    prepared = {each: PEERS[each.name].prepare(case, each, sets[0]) for each in peers}
    densities |= {each: ready.density for each, ready in prepared.items()}
    calls = {each: _timed(each, case, sets, settings.repeats, prepared.get(each)) for each in variants}
    times = durations(calls, len(sets), device, partial(watch, f"{shape.name}: timing"))
    extra = {each: extra_memory(partial(timed.call, 0), device) for each, timed in calls.items()}
    times_ms = {each: time_columns("ms", [1000 * seconds for seconds in times[each]]) for each in variants}
    for each in sparse:
        stages += _stage_rows(each, case, sets[0], settings.repeats, times_ms[each]["ms"], watch)

    against = compared_with(baselines)
    dense_ms = times_ms[Variant("dense", against)]["ms"]
    rows = []
    for each, columns in times_ms.items():
        density, ms = densities.get(each, 1.0), columns["ms"]
        operations = 4 * shape.tokens**2 * shape.heads * shape.head_dim * density
        rows.append(
            Row(
                shape=shape.name,
                **case_columns(case, each),
                **columns,
                density=density,
                ideal=1 / density,
                input_sets=len(sets),
                dense=against,
                dense_ms=dense_ms,
                ratio=dense_ms / ms,
                tflops=operations / ms / 1e9,  # per ms to 10^12 per s
                extra_bytes=extra[each],
                error=errors.get(each),
            )
        )
    unable |= {Variant("dense", name): why for name, why in no_baselines.items()}
    unable |= {Variant("sparse", name): why for name, why in no_backends.items()}
    rows += [Row(shape=shape.name, **case_columns(case, each), not_run=why) for each, why in unable.items()]
    return OpResult(checks, rows, stages)


def _precisions(case: Case, settings: OpSettings, backends: list[str]) -> tuple[list[Variant], dict[Variant, str]]:
    """The backends in every precision that they have, and why not in others. Raises BenchError where none has one."""
    reasons = {
        Variant("sparse", name, precision=precision): BACKENDS[name].why_not(case.call(precision))
        for name in backends
        for precision in settings.precision
    }
    for precision in settings.precision:
        here = {each.name: reason for each, reason in reasons.items() if each.precision == precision}
        if None not in here.values():
            listed = "; ".join(f"{name}: {reason}" for name, reason in here.items())
            raise BenchError(f"precision {precision}: {listed}; allowed: what one of the backends can run.")
    unable = {each: reason for each, reason in reasons.items() if reason is not None}
    return [each for each in reasons if each not in unable], unable


def _errors(case: Case, sparse: list[Variant], peers: list[Variant], watch: Watch) -> dict[Variant, float | None]:
    """Of calls on smooth inputs, against dense attention."""
    qkv = case.smooth_inputs(1)
    full, layout, errors = sdpa(*qkv), case.layout(), dict[Variant, float | None]()
    for number, each in enumerate((*sparse, *peers)):
        watch(f"{case.shape.name}: error of {each}", number, len(sparse) + len(peers))
        if each.kind == "peer":
            errors[each] = PEERS[each.name].prepare(case, each, qkv).error(qkv, full)
        else:
            out = rectified_attention(*qkv, layout, case.config_of(each), backend=each.name)
            errors[each] = relative_error(str(each), out, full)
    return errors


def _timed(variant: Variant, case: Case, sets: list[Tensors], repeats: int, prepared: Prepared | None = None) -> Timed:
    if variant.kind == "dense":
        run = BASELINES[variant.name].run
        return Timed(lambda i: run(*sets[i]), repeats)
    if prepared is not None:
        return Timed(lambda i: prepared.run(*sets[i]), repeats)
    if case.device.type == "cuda" and variant.name in _SLOW_ON_GPUS:
        repeats = max(FEWEST_REPEATS, repeats // 3)
    layout, config = case.layout(), case.config_of(variant)
    return Timed(lambda i: rectified_attention(*sets[i], layout, config, backend=variant.name), repeats)


def _stage_rows(
    variant: Variant, case: Case, qkv: Tensors, repeats: int, whole_ms: float, watch: Watch
) -> list[StageRow]:
    """The stages one by one, each again and again on the same intermediate results."""
    name, config = case.shape.name, case.config_of(variant)
    stages = stages_of(variant.name, case._replace(config=config), qkv)
    calls = {stage: Timed(lambda _, run=run: run(), repeats) for stage, run in stages.items()}  # type: ignore[misc]
    times = durations(calls, 1, case.device, partial(watch, f"{name}: stages of {variant.title}"))
    columns = {stage: time_columns("ms", [1000 * each for each in seconds]) for stage, seconds in times.items()}
    total = sum(each["ms"] for each in columns.values())
    common = {"shape": name, "backend": variant.title, "sparsity": variant.sparsity, **config_columns(config)}
    return [
        StageRow(**common, **each, stage=stage, share=each["ms"] / total, whole_ms=whole_ms)
        for stage, each in columns.items()
    ]
