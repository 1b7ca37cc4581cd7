"""The rows of the benchmarks' CSV files. `config` is the whole SparseConfig, as JSON."""

import json
from dataclasses import dataclass
from typing import Any

from ...config import SparseConfig


def config_columns(config: SparseConfig) -> dict[str, Any]:
    return {"rectify": config.rectify, "order": config.order, "config": json.dumps(config.to_dict())}


@dataclass(frozen=True, kw_only=True)
class _ConfigRow:
    rectify: str
    order: str
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class Row(_ConfigRow):
    """One baseline, or one backend at one sparsity, on one shape.

    kind         "dense" or "sparse"
    density      computed query-key pairs over all pairs; ideal: 1 / density
    ms ...       milliseconds of a call: median, quartiles, extremes
    dense        the baseline of `ratio`, and its median; ratio = dense_ms / ms
    tflops       4 * D floating-point operations for every computed pair, over the median, in TFLOP/s
    extra_bytes  peak memory of one call, its output included; None on a CPU
    not_run      the reason why there is no measurement, else empty
    """

    shape: str
    tokens: int
    heads: int
    head_dim: int
    block_size: int
    dtype: str
    kind: str
    name: str
    sparsity: float | None = None
    density: float | None = None
    ideal: float | None = None
    ms: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    repeats: int | None = None
    input_sets: int | None = None
    dense: str = ""
    dense_ms: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    extra_bytes: int | None = None
    not_run: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRow(_ConfigRow):
    """One stage of a backend: milliseconds as in Row, and its share of the sum of all stages' medians.

    whole_ms: the median of the whole call, timed on its own.
    """

    shape: str
    backend: str
    sparsity: float
    stage: str
    ms: float
    ms_q1: float
    ms_q3: float
    ms_min: float
    ms_max: float
    repeats: int
    share: float
    whole_ms: float


@dataclass(frozen=True, kw_only=True)
class _ModelRow(_ConfigRow):
    """name: of the baseline or the backend; how: "eager" or "compiled"; dense: the baseline of the speed-up."""

    model: str
    size: str
    name: str
    how: str
    dense: str


@dataclass(frozen=True, kw_only=True)
class ForwardRow(_ModelRow):
    """One forward of a whole transformer with one kind of attention.

    kind         "dense", "sparse", or "removed" (v copied in the place of attention: what sparsity cannot reach)
    layers       of the whole model; layers_low, layers_high: of the two models that were timed
    low_s ...    seconds of a forward of those two, medians
    seconds ...  of the whole model, scaled from the two round by round: median, quartiles, extremes
    unit_s, constant_s  seconds of one unit of layers, and of everything but the layers, from the medians
    measured_s   one forward of all layers, None where it was not run
    dense_s      eager median of the baseline; ratio = dense_s / seconds
    """

    tokens: int
    batch: int
    heads: int
    head_dim: int
    block_size: int
    dtype: str
    diffusers: str
    kind: str
    sparsity: float | None
    density: float | None
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


@dataclass(frozen=True, kw_only=True)
class ScheduleRow(_ModelRow):
    """A denoising run, computed from forwards and a preset's schedule.

    computed_steps       of `steps`; the others are skipped by a cache and cost nothing here. source: who says so
    dense_forward_s      a forward of a dense step; sparse_forward_s: of another, its dense layers included
    total_s              calls * (dense_steps * dense_forward_s + (computed_steps - dense_steps) * sparse_forward_s)
    dense_total_s        all steps with the eager baseline; speedup = dense_total_s / total_s
    paper                published speed-up at this sparsity; paper_composed: with TeaCache; None where there is none
    steps_for_composed   most computed steps with which `paper_composed` is reached, None where it never is
    """

    preset: str
    sparsity: float
    density: float
    steps: int
    computed_steps: int
    source: str
    dense_steps: int
    dense_layers: int
    calls: int
    dense_forward_s: float
    sparse_forward_s: float
    total_s: float
    dense_total_s: float
    speedup: float
    paper: float | None
    paper_composed: float | None
    steps_for_composed: int | None

    @staticmethod
    def columns_of(row: ForwardRow) -> dict[str, Any]:
        """What a run has in common with its forward."""
        return {name: getattr(row, name) for name in (*_ModelRow.__dataclass_fields__, "sparsity", "density")}
