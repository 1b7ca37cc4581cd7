"""The rows of the benchmarks' CSV files. `config` is the whole SparseConfig, as JSON."""

import json
from dataclasses import dataclass, replace
from typing import Any

from ...config import SparseConfig
from .shapes import Case, Variant


def config_columns(config: SparseConfig) -> dict[str, Any]:
    return {"rectify": config.rectify, "order": config.order, "config": json.dumps(config.to_dict())}


def case_columns(case: Case, variant: Variant) -> dict[str, Any]:
    """What every row of a variant has."""
    return {
        "tokens": case.shape.tokens,
        "heads": case.shape.heads,
        "head_dim": case.shape.head_dim,
        "block_size": case.config.block_size,
        "dtype": case.dtype_name,
        **variant._asdict(),
        **config_columns(case.config_of(variant)),
    }


@dataclass(frozen=True, kw_only=True)
class _ConfigRow:
    rectify: str
    order: str
    config: str = ""
    sparsity: float | None = None


@dataclass(frozen=True, kw_only=True)
class _CaseRow(_ConfigRow):
    tokens: int
    heads: int
    head_dim: int
    block_size: int
    dtype: str
    kind: str
    name: str
    precision: str = "inputs"
    density: float | None = None

    @property
    def label(self) -> str:
        """What ran, in words."""
        words = {"dense": f"dense {self.name}", "peer": f"peer {self.name}", "removed": "attention removed"}
        return words.get(self.kind, Variant(self.kind, self.name, precision=self.precision).title)


@dataclass(frozen=True, kw_only=True)
class _TimedRow(_ConfigRow):
    ms: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    repeats: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row(_CaseRow, _TimedRow):
    """One baseline, or one backend or peer at one sparsity, on one shape.

    kind         "dense", "sparse" or "peer"
    density      computed query-key pairs over all pairs; ideal: 1 / density
    ms ...       milliseconds of a call: median, quartiles, extremes
    dense        the baseline of `ratio`, and its median; ratio = dense_ms / ms
    tflops       4 * D floating-point operations for every computed pair, over the median, in TFLOP/s
    extra_bytes  peak memory of one call, its output included; None on a CPU
    error        |out - full| / |full| of a call on Case.smooth_inputs; None for dense ones and for pairs not known
    not_run      the reason why there is no measurement, else empty
    """

    shape: str
    ideal: float | None = None
    input_sets: int | None = None
    dense: str = ""
    dense_ms: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    not_run: str = ""

    @property
    def extra_gib(self) -> float | None:
        return None if self.extra_bytes is None else self.extra_bytes / 2**30


@dataclass(frozen=True, kw_only=True)
class StageRow(_TimedRow):
    """One stage of a backend: milliseconds as in Row, and its share of the sum of all stages' medians.

    whole_ms: the median of the whole call, timed on its own.
    """

    shape: str
    backend: str
    stage: str
    share: float | None
    whole_ms: float


@dataclass(frozen=True, kw_only=True)
class ModelRow(_ConfigRow):
    """What rows of a model's forwards and runs have in common.

    how    "eager" or "compiled"; size: see SIZES of models.py
    dense  the baseline that the speed-up is over
    """

    model: str
    size: str
    name: str
    how: str
    dense: str
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class ForwardRow(_CaseRow, ModelRow):
    """One forward of a whole transformer with one kind of attention.

    kind         "dense", "sparse", or "removed" (v copied in the place of attention: what sparsity cannot reach)
    layers       of the whole model; layers_low, layers_high: of the two models that were timed
    low_s ...    seconds of a forward of those two, medians
    seconds ...  of the whole model, scaled from the two round by round: median, quartiles, extremes
    unit_s, constant_s  seconds of one unit of layers, and of everything but the layers, from the medians
    measured_s   one forward of all layers, None where it was not run
    dense_s      eager median of the baseline; ratio = dense_s / seconds
    memory_bytes weights of all layers, and what a forward takes beside them at its peak; None on a CPU
    """

    batch: int
    diffusers: str
    layers: int
    layers_low: int
    layers_high: int
    units: int
    low_s: float
    high_s: float
    unit_s: float
    constant_s: float
    seconds: float
    seconds_q1: float
    seconds_q3: float
    seconds_min: float
    seconds_max: float
    repeats: int
    measured_s: float | None
    dense_s: float
    ratio: float
    memory_bytes: int | None = None

    @property
    def memory_gib(self) -> float | None:
        return None if self.memory_bytes is None else self.memory_bytes / 2**30

    @property
    def off_by(self) -> float | None:
        """How far the scaled time is from the measured one, as a share of it."""
        return None if self.measured_s is None else self.seconds / self.measured_s - 1


@dataclass(frozen=True)
class Schedule:
    """A denoising run. Raises ValueError unless dense_steps <= computed_steps <= steps.

    steps           of the run
    computed_steps  those that no cache skips, the others cost nothing; source: who says so
    dense_steps     those with full attention, all of them computed
    calls           forwards a step
    dense_layers    with full attention in the other steps
    preset          whose schedule it is
    """

    steps: int
    computed_steps: int
    dense_steps: int
    calls: int
    dense_layers: int = 0
    preset: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}; allowed: 1 or more.")
        if not self.dense_steps <= self.computed_steps <= self.steps:
            raise ValueError(
                f"computed steps: got {self.computed_steps}; allowed: {self.dense_steps} to {self.steps}: the dense "
                "steps at the start are computed, and no more than there are."
            )

    def seconds(self, dense_forward: float, sparse_forward: float) -> float:
        sparse_steps = self.computed_steps - self.dense_steps
        return self.calls * (self.dense_steps * dense_forward + sparse_steps * sparse_forward)

    def most_computed(self, dense_forward: float, sparse_forward: float, allowed: float) -> int | None:
        """Most computed steps with which it takes `allowed` seconds or less; None where the dense steps take longer."""
        counts = range(max(self.dense_steps, 1), self.steps + 1)
        runs = (replace(self, computed_steps=count) for count in counts)
        fit = (each.computed_steps for each in runs if each.seconds(dense_forward, sparse_forward) <= allowed)
        return max(fit, default=None)


@dataclass(frozen=True, kw_only=True)
class ScheduleRow(ModelRow, Schedule):
    """A denoising run, computed from forwards and a preset's schedule.

    dense_forward_s     a forward of a dense step; sparse_forward_s: of another, its dense layers included
    total_s             calls * (dense_steps * dense_forward_s + (computed_steps - dense_steps) * sparse_forward_s)
    dense_total_s       all steps with the eager baseline; speedup = dense_total_s / total_s
    paper               published speed-up at this sparsity; paper_composed: with TeaCache; None where there is none
    steps_for_composed  most computed steps with which `paper_composed` is reached, None where it never is
    """

    dense_forward_s: float
    sparse_forward_s: float
    total_s: float
    dense_total_s: float
    speedup: float
    paper: float | None
    paper_composed: float | None
    steps_for_composed: int | None
