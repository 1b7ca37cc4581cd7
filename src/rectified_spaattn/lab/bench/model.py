"""Whole transformers with dense, sparse and no attention: check, time a few layers, scale, and make rows."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ...backends import choose
from ...presets import preset
from .architecture import Model
from .baselines import BASELINES
from .check import Check
from .model_check import check_first_runs, check_model
from .model_rows import Key, Times, forward_rows, schedule_rows
from .processes import cut, slowest
from .rows import ForwardRow, ScheduleRow
from .settings import ModelSettings, runnable
from .shapes import REMOVED, BenchError, Case, Variant, Watch
from .timing import Timed, durations, extra_memory
from .weights import build, compile_blocks, enable, inputs_for, output, shallow_copy, weight_bytes

_PAPER_SPARSITY, _HIGH_SPARSITY = 0.797, 0.8895
_UNASKED = {"cuda": ("cudnn", "fa4"), "cpu": ("sdpa",)}  # baselines timed where none is named


class ModelResult(NamedTuple):
    """What came of one model; not_run: baseline -> reason."""

    checks: list[Check]
    forwards: list[ForwardRow]
    schedules: list[ScheduleRow]
    not_run: dict[str, str]


@torch.no_grad()
def measure(name: str, settings: ModelSettings, watch: Watch) -> ModelResult:
    """Checks, then times everything in one interleaved loop.

    Raises BenchError, before anything is timed, where a result is wrong or something asked for cannot run.
    """
    model = settings.sized(name)
    case = settings.case(model.shape)
    device, dtype = case.device, case.dtype
    variants, not_run = _variants(model, settings, case)
    depth = 2 if model.layers_a_unit > 1 else 3  # units of the deeper of the two models that are timed
    hows = ("eager", "compiled") if settings.compile else ("eager",)
    watch(f"{name}: making weights", 0, 1)
    weights = build(model, model.units if settings.full else depth, device, dtype)
    watch(f"{name}: checking", 0, 1)
    checks = check_model(weights, model, variants, case)
    inputs = inputs_for(model, model.shape.grid, device, dtype)
    make = partial(_Forward, weights, model, case, settings.compiler, inputs)
    alone = _alone(weights, model, variants, case, inputs)

    torch.compiler.reset()  # the shapes of a model before would make this one's compiled code general
    keys = [Key(variant, how, units) for variant in variants for how in hows for units in (1, depth)]
    forwards = {key: make(key) for key in keys}
    outputs = {}
    for number, (key, forward) in enumerate(forwards.items()):
        watch(f"{name}: first run of {key.variant}, {key.how}", number, len(keys))
        outputs[key] = forward()
    checks += check_first_runs(model.name, outputs, checks[0].allowed, alone)
    density = {key.variant: forwards[key].density() for key in keys if key.variant.kind == "sparse"}

    calls = {key: Timed(forward, settings.repeats) for key, forward in forwards.items()}
    seconds = slowest(durations(calls, 1, device, partial(watch, f"{name}: timing"), warm_up=0), device)
    whole: Times = {}
    if settings.full:
        ends = (Key(variants[0], "eager", model.units), Key(variants[-2], hows[-1], model.units))
        calls = {key: Timed(make(key), 1) for key in ends}
        whole = slowest(durations(calls, 1, device, partial(watch, f"{name}: all layers, once"), warm_up=0), device)
    beside = {key: extra_memory(forward, device) for key, forward in forwards.items() if key.units == depth}
    bytes_held = weight_bytes(weights, model, depth)
    memory = {key: None if extra is None else bytes_held + extra for key, extra in beside.items()}
    rows = forward_rows(model, settings.size, case, seconds, whole, density, memory)
    return ModelResult(checks, rows, schedule_rows(model, settings.schedule_of(model), rows), not_run)


def _variants(model: Model, settings: ModelSettings, case: Case) -> tuple[list[Variant], dict[str, str]]:
    """What is timed, and the baselines that would have been, with the reasons why they cannot."""
    reasons = {name: baseline.why_not(case) for name, baseline in BASELINES.items()}
    unasked = _UNASKED[case.device.type]
    baselines, not_run = runnable("baseline", settings.baseline, reasons, model.name, unasked)
    try:
        backend = choose(settings.backend, case.call())
    except (RuntimeError, ValueError) as error:
        raise BenchError(str(error)) from error
    usual = {preset(settings.preset or model.preset)[0].sparsity, *(model.paper or (_PAPER_SPARSITY,)), _HIGH_SPARSITY}
    sparse = [Variant("sparse", backend, sparsity) for sparsity in sorted(settings.sparsity or usual)]
    return [*(Variant("dense", name) for name in baselines), *sparse, REMOVED], not_run


def _alone(
    weights: nn.Module, model: Model, variants: list[Variant], case: Case, inputs: dict[str, Any]
) -> dict[Variant, torch.Tensor]:
    """What one process by itself gives for one unit of layers; empty where there is but one."""
    if not dist.is_initialized():
        return {}
    outputs = {}
    for variant in variants:
        twin = shallow_copy(weights, model, 1)
        enable(twin, variant, case.config)
        outputs[variant] = output(twin, inputs)
    return outputs


class _Forward:
    """A model of its own on the shared weights, with one kind of attention; all processes have a part in it."""

    def __init__(
        self, weights: nn.Module, model: Model, case: Case, compiler: str, inputs: dict[str, Any], key: Key
    ) -> None:
        self._transformer = shallow_copy(weights, model, key.units)
        cut(self._transformer)
        self._handle = enable(self._transformer, key.variant, case.config)
        self._layers, self._inputs = key.units * model.layers_a_unit, inputs
        if key.how == "compiled":
            compile_blocks(self._transformer, compiler)

    def __call__(self, input_set: int = 0) -> torch.Tensor:
        return output(self._transformer, self._inputs)

    def density(self) -> float:
        """The mean over all calls. Raises BenchError where one was dense."""
        stats = self._handle.stats()
        if stats.dense_calls or stats.sparse_calls != stats.forwards * self._layers:
            raise BenchError(
                f"got {stats.sparse_calls} sparse and {stats.dense_calls} dense attention calls "
                f"{stats.dense_reasons} in {stats.forwards} forwards; allowed: {self._layers} sparse ones a forward. "
                "Nothing was timed."
            )
        return float(stats.density)
