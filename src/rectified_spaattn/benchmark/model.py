"""Whole transformers with dense, sparse and no attention: check, time a few layers, scale, and make rows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends import Call, choose
from ..config import Rectify, SparseConfig, preset
from .baselines import BASELINES
from .check import BenchError, Checked, config_at
from .model_check import check_first_runs, check_model
from .model_rows import Key, Times, forward_rows, schedule_rows
from .models import MODELS, SIZES, Model
from .modes import REMOVED, Mode, enable
from .op import DTYPES, Watch, check_names, device_for
from .record import ForwardRow, ScheduleRow
from .schedule import Schedule, schedule
from .shapes import Case
from .timing import Timed, durations, ignoring_set
from .weights import build, compile_blocks, inputs_for, output, shallow_copy

_PAPER_SPARSITY, _HIGH_SPARSITY = 0.797, 0.8895
_UNASKED = {"cuda": ("cudnn", "fa4"), "cpu": ("sdpa",)}  # baselines timed where none is named
_FEWEST_REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One run. Raises ValueError for values out of range.

    sparsities      empty for the preset's, the paper's (or 0.797) and 0.8895; baselines: empty for cudnn and fa4
    units           units of layers in the deeper of the two models that are timed, the other has one; None for 2, or 3
                    where a unit is a single layer
    repeats         rounds that count, after one that warms up
    compiler        backend of torch.compile; None for no compiled forwards
    full            also run two forwards with all layers, once: eager dense, and the sparsest, compiled where asked for
    computed_steps  of `steps`, None for all of them; source: who says that a cache skips the others
    """

    models: tuple[str, ...] = ("hunyuan-video",)
    size: str = "full"
    sparsities: tuple[float, ...] = ()
    baselines: tuple[str, ...] = ()
    backend: str = "auto"
    block_size: int = 128
    rectify: Rectify = "ipar+gapr"
    order: str = "gilbert"
    dtype: str = "bfloat16"
    units: int | None = None
    repeats: int = 3
    compiler: str | None = "inductor"
    full: bool = False
    steps: int | None = None
    computed_steps: int | None = None
    source: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        check_names("model", self.models, tuple(MODELS))
        check_names("size", (self.size,), tuple(SIZES))
        check_names("baseline", self.baselines, tuple(BASELINES))
        check_names("dtype", (self.dtype,), tuple(DTYPES))
        check_names("device", (self.device,), ("auto", "cpu", "cuda"))
        if not self.models:
            raise ValueError(f"model: got none; allowed: one or more of {list(MODELS)}.")
        if self.repeats < _FEWEST_REPEATS:
            raise ValueError(f"repeats: got {self.repeats}; allowed: {_FEWEST_REPEATS} or more.")
        if len(set(self.sparsities)) != len(self.sparsities):
            raise ValueError(f"sparsity: got {list(self.sparsities)}; allowed: values that differ.")
        for sparsity in self.sparsities:
            config_at(sparsity)
        SparseConfig(block_size=self.block_size, rectify=self.rectify, order=self.order)
        if (self.computed_steps is None) != (self.source == ""):
            raise ValueError(
                f"computed steps: got {self.computed_steps} from {self.source!r}; allowed: both or neither. "
                "Name the measurement or publication the number comes from."
            )
        if self.computed_steps is not None and len(self.models) > 1:
            raise ValueError(f"computed steps: got {len(self.models)} models; allowed: one, as caches differ.")
        for name in self.models:
            model = self.model(name)
            self.schedule_of(model)
            if not 2 <= self.units_of(model) <= model.units:
                raise ValueError(f"units: got {self.units}; allowed for {name}: 2 to {model.units}.")
            if model.shape.video // self.block_size < 2:
                raise ValueError(f"block_size: got {self.block_size}; allowed for {name}: one that gives two blocks.")

    def model(self, name: str) -> Model:
        return SIZES[self.size](MODELS[name])

    def units_of(self, model: Model) -> int:
        return self.units if self.units is not None else 2 if model.layers_a_unit > 1 else 3

    def schedule_of(self, model: Model) -> Schedule:
        """The preset's Schedule. Raises ValueError for step counts that do not fit it."""
        steps = model.steps if self.steps is None else self.steps
        computed = steps if self.computed_steps is None else self.computed_steps
        return schedule(steps, computed, preset(model.preset)[0].dense_step_count(steps), model.calls)

    def where(self) -> torch.device:
        """Raises BenchError where a GPU is asked for and there is none."""
        return device_for(self.device, "Use cpu and --size tiny.")


class MeasuredModel(NamedTuple):
    """What came of one model; not_run: baseline -> reason; took: phase -> seconds."""

    checks: list[Checked]
    forwards: list[ForwardRow]
    schedules: list[ScheduleRow]
    not_run: dict[str, str]
    took: dict[str, float]


@torch.no_grad()
def measure(name: str, settings: ModelSettings, watch: Watch) -> MeasuredModel:
    """Checks, then times everything in one interleaved loop.

    Raises BenchError, before anything is timed, where a result is wrong or something asked for cannot run.
    """
    model, device, dtype = settings.model(name), settings.where(), DTYPES[settings.dtype]
    case = Case(model.shape, settings.block_size, dtype, device, settings.rectify, settings.order)
    modes, not_run = _modes(model, settings, case)
    depth = settings.units_of(model)
    hows = ("eager",) if settings.compiler is None else ("eager", "compiled")
    took: dict[str, float] = {}
    with _phase("weights and checks", took):
        watch(f"{name}: making weights", 0, 1)
        weights = build(model, model.units if settings.full else depth, device, dtype)
        watch(f"{name}: checking", 0, 1)
        checks = check_model(weights, model, modes, case)
    inputs = inputs_for(model, model.shape.grid, device, dtype)
    make = partial(_Forward, weights, model, case, settings.compiler)

    with _phase("first runs and compilation", took):
        torch.compiler.reset()  # the shapes of a model before would make this one's compiled code general
        keys = [Key(mode, how, units) for mode in modes for how in hows for units in (1, depth)]
        forwards = {key: make(key) for key in keys}
        outputs = {}
        for done, (key, forward) in enumerate(forwards.items()):
            watch(f"{name}: first run of {key.mode}, {key.how}", done, len(keys))
            outputs[key] = forward(inputs)
        checks += check_first_runs(model.name, outputs, checks[0].allowed)
        density = {key.mode: forwards[key].density() for key in keys if key.mode.kind == "sparse"}

    with _phase("timing", took):
        seconds = _time(forwards, inputs, settings.repeats, device, partial(watch, f"{name}: timing"))
    whole: Times = {}
    if settings.full:
        with _phase("all layers", took):
            ends = (Key(modes[0], "eager", model.units), Key(modes[-2], hows[-1], model.units))
            every = {key: make(key) for key in ends}
            whole = _time(every, inputs, 1, device, partial(watch, f"{name}: all layers, once"))
    rows = forward_rows(model, settings.size, case, seconds, whole, density)
    runs = schedule_rows(model, settings.schedule_of(model), settings.source, rows)
    return MeasuredModel(checks, rows, runs, not_run, took)


@contextmanager
def _phase(name: str, took: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    took[name] = time.perf_counter() - start


def _modes(model: Model, settings: ModelSettings, case: Case) -> tuple[list[Mode], dict[str, str]]:
    """What is timed, and the baselines that would have been, with the reasons why they cannot."""
    from ..pipelines import ADAPTERS

    if model.transformer not in ADAPTERS:
        raise BenchError(
            f"{model.name}: got a {model.transformer}, which rectified_spaattn.enable does not support yet; allowed: "
            f"models of {list(ADAPTERS)}."
        )
    wanted = settings.baselines or _UNASKED[case.device.type]
    reasons = {name: BASELINES[name].why_not(case) for name in wanted}
    not_run = {name: reason for name, reason in reasons.items() if reason is not None}
    if not_run and (settings.baselines or len(not_run) == len(wanted)):
        name, reason = next(iter(not_run.items()))
        can = [each for each, baseline in BASELINES.items() if baseline.why_not(case) is None]
        raise BenchError(f"baseline {name}: {reason}; allowed for {model.name} here: {can}.")
    blocks = case.shape.video // case.block_size
    call = Call(case.device, case.dtype, case.shape.head_dim, case.block_size, blocks)
    try:
        backend = choose(settings.backend, call)
    except (RuntimeError, ValueError) as error:
        raise BenchError(str(error)) from error
    usual = {preset(model.preset)[0].sparsity, *(model.paper or (_PAPER_SPARSITY,)), _HIGH_SPARSITY}
    sparse = [Mode("sparse", backend, sparsity) for sparsity in sorted(settings.sparsities or usual)]
    return [*(Mode("dense", name) for name in wanted if name not in not_run), *sparse, REMOVED], not_run


class _Forward:
    """A model of its own on the shared weights, with one kind of attention."""

    def __init__(self, weights: nn.Module, model: Model, case: Case, compiler: str | None, key: Key) -> None:
        self._transformer = shallow_copy(weights, model, key.units)
        self._handle = enable(self._transformer, key.mode, case)
        self._layers = key.units * model.layers_a_unit
        if key.how == "compiled":
            compile_blocks(self._transformer, model, str(compiler))

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
    calls = {str(key): Timed(ignoring_set(partial(forward, inputs)), repeats) for key, forward in forwards.items()}
    seconds = durations(calls, 1, device, watch, warm_up=0)
    return {key: seconds[str(key)] for key in forwards}
