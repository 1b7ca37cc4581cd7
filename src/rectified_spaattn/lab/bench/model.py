"""Whole transformers with dense, sparse and no attention: check, time a few layers, scale, and make rows."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...backends import choose
from ...config import check_choice
from ...presets import preset
from ..option import option
from .baselines import BASELINES
from .check import Check
from .model_check import check_first_runs, check_model
from .model_rows import Key, Schedule, Times, forward_rows, schedule_rows
from .models import MODELS, SIZES, Model
from .rows import ForwardRow, ScheduleRow
from .settings import BenchSettings, check_names, runnable
from .shapes import DTYPES, REMOVED, BenchError, Case, Variant, Watch
from .timing import Timed, durations
from .weights import build, compile_blocks, enable, inputs_for, output, shallow_copy

_PAPER_SPARSITY, _HIGH_SPARSITY = 0.797, 0.8895
_UNASKED = {"cuda": ("cudnn", "fa4"), "cpu": ("sdpa",)}  # baselines timed where none is named


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BenchSettings):
    """One run. Raises ValueError or TypeError for values out of range.

    units           of layers in the deeper of the two models that are timed, the other has one; None for 2, or 3 where
                    a unit is a single layer
    computed_steps  of `steps`; computed_steps_source: who says that a cache skips the others
    """

    model: tuple[str, ...] = option("Timed one after the other.", choices=tuple(MODELS), flag="ARGUMENT")
    size: str = option("Tiny: the same layers, narrow and few, for a CPU.", "full", choices=tuple(SIZES))
    sparsity: tuple[float, ...] = option(
        "Share of blocks to drop; may be repeated.", (), unset="the preset's, the paper's and 0.8895"
    )
    baseline: tuple[str, ...] = option(
        "May be repeated.", (), choices=tuple(BASELINES), unset="cudnn, fa4 where installed; sdpa on a CPU"
    )
    backend: str = option("Backend of sparse attention, or auto.", "auto")
    repeats: int = option("Rounds that count, after one that warms up.", 3)
    units: int | None = option(
        "Units of layers in the deeper of the two models that are timed; the other has one.",
        None,
        unset="2 where a unit is 1 double and 2 single layers, 3 where it is one layer",
    )
    full: bool = option("Also run all layers once: eager dense, and the sparsest, compiled where it is.", False)
    compile: bool = option("Also time compile_repeated_blocks(fullgraph=True).", True, flag="--compile/--no-compile")
    compiler: str = option("Backend of torch.compile.", "inductor")
    steps: int | None = option("Denoising steps of a run.", None, unset="the model's, 50")
    computed_steps: int | None = option("Steps that a cache such as TeaCache leaves to compute.", None, unset="all")
    computed_steps_source: str = option("Where that number comes from: a measurement or a publication.", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("model", self.model, tuple(MODELS))
        check_choice("size", self.size, tuple(SIZES))
        if not self.model:
            raise ValueError(f"model: got none; allowed: one or more of {list(MODELS)}.")
        if (self.computed_steps is None) != (self.computed_steps_source == ""):
            raise ValueError(
                f"computed steps: got {self.computed_steps} from {self.computed_steps_source!r}; allowed: both or "
                "neither. Name the measurement or publication the number comes from."
            )
        if self.computed_steps is not None and len(self.model) > 1:
            raise ValueError(f"computed steps: got {len(self.model)} models; allowed: one, as caches differ.")
        for name in self.model:
            model, block_size = self.sized(name), self.config().block_size
            self.schedule_of(model)
            if not 2 <= self.units_of(model) <= model.units:
                raise ValueError(f"units: got {self.units}; allowed for {name}: 2 to {model.units}.")
            if model.shape.video // block_size < 2:
                raise ValueError(f"block_size: got {block_size}; allowed for {name}: one that gives two blocks.")

    def sized(self, name: str) -> Model:
        return SIZES[self.size](MODELS[name])

    def units_of(self, model: Model) -> int:
        return self.units if self.units is not None else 2 if model.layers_a_unit > 1 else 3

    def schedule_of(self, model: Model) -> Schedule:
        """The preset's. Raises ValueError for step counts that do not fit it."""
        published = preset(self.preset or model.preset)[0]
        steps = model.steps if self.steps is None else self.steps
        computed = steps if self.computed_steps is None else self.computed_steps
        dense = published.dense_step_count(steps)
        return Schedule(steps, computed, dense, model.calls, len(published.dense_layers)).check()


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
    model, device, dtype = settings.sized(name), settings.where(), DTYPES[settings.dtype]
    case = Case(model.shape, settings.config(), dtype, device)
    variants, not_run = _variants(model, settings, case)
    depth = settings.units_of(model)
    hows = ("eager", "compiled") if settings.compile else ("eager",)
    watch(f"{name}: making weights", 0, 1)
    weights = build(model, model.units if settings.full else depth, device, dtype)
    watch(f"{name}: checking", 0, 1)
    checks = check_model(weights, model, variants, case)
    inputs = inputs_for(model, model.shape.grid, device, dtype)
    make = partial(_Forward, weights, model, case, settings.compiler)

    torch.compiler.reset()  # the shapes of a model before would make this one's compiled code general
    keys = [Key(variant, how, units) for variant in variants for how in hows for units in (1, depth)]
    forwards = {key: make(key) for key in keys}
    outputs = {}
    for number, (key, forward) in enumerate(forwards.items()):
        watch(f"{name}: first run of {key.variant}, {key.how}", number, len(keys))
        outputs[key] = forward(inputs)
    checks += check_first_runs(model.name, outputs, checks[0].allowed)
    density = {key.variant: forwards[key].density() for key in keys if key.variant.kind == "sparse"}

    seconds = _time(forwards, inputs, settings.repeats, device, partial(watch, f"{name}: timing"))
    whole: Times = {}
    if settings.full:
        ends = (Key(variants[0], "eager", model.units), Key(variants[-2], hows[-1], model.units))
        every = {key: make(key) for key in ends}
        whole = _time(every, inputs, 1, device, partial(watch, f"{name}: all layers, once"))
    rows = forward_rows(model, settings.size, case, seconds, whole, density)
    runs = schedule_rows(
        model, settings.schedule_of(model), settings.preset or model.preset, settings.computed_steps_source, rows
    )
    return ModelResult(checks, rows, runs, not_run)


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


class _Forward:
    """A model of its own on the shared weights, with one kind of attention."""

    def __init__(self, weights: nn.Module, model: Model, case: Case, compiler: str, key: Key) -> None:
        self._transformer = shallow_copy(weights, model, key.units)
        self._handle = enable(self._transformer, key.variant, case.config)
        self._layers = key.units * model.layers_a_unit
        if key.how == "compiled":
            compile_blocks(self._transformer, model, compiler)

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        return output(self._transformer, inputs)

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


def _time(
    forwards: dict[Key, _Forward], inputs: dict[str, Any], repeats: int, device: torch.device, watch: Any
) -> Times:
    calls = {key: Timed(lambda _, run=run: run(inputs), repeats) for key, run in forwards.items()}  # type: ignore[misc]
    return durations(calls, 1, device, watch, warm_up=0)
