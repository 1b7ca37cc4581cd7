"""The rows of the benchmarks' CSV files. `config` is the whole SparseConfig, as JSON."""

import json
from dataclasses import dataclass
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
        "dtype": str(case.dtype).removeprefix("torch."),
        **variant._asdict(),
        **config_columns(case.config_of(variant)),
    }


@dataclass(frozen=True, kw_only=True)
class _ConfigRow:
    rectify: str
    order: str
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class _CaseRow(_ConfigRow):
    tokens: int
    heads: int
    head_dim: int
    block_size: int
    dtype: str
    kind: str
    name: str
    sparsity: float | None = None
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row(_CaseRow):
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
class ForwardRow(_CaseRow):
    """One forward of a whole transformer with one kind of attention.

    kind         "dense", "sparse", or "removed" (v copied in the place of attention: what sparsity cannot reach)
    layers       of the whole model; layers_low, layers_high: of the two models that were timed
    low_s ...    seconds of a forward of those two, medians
    seconds ...  of the whole model, scaled from the two round by round: median, quartiles, extremes
    unit_s, constant_s  seconds of one unit of layers, and of everything but the layers, from the medians
    measured_s   one forward of all layers, None where it was not run
    how          "eager" or "compiled"
    dense        the baseline of `ratio`, and its eager median; ratio = dense_s / seconds
    """

    model: str
    size: str
    batch: int
    diffusers: str
    how: str
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
    dense: str
    dense_s: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class ScheduleRow(_ConfigRow):
    """A denoising run, computed from forwards and a preset's schedule.

    computed_steps       of `steps`; the others are skipped by a cache and cost nothing here. source: who says so
    dense_forward_s      a forward of a dense step; sparse_forward_s: of another, its dense layers included
    total_s              calls * (dense_steps * dense_forward_s + (computed_steps - dense_steps) * sparse_forward_s)
    dense, dense_total_s the eager baseline and all steps with it; speedup = dense_total_s / total_s
    paper                published speed-up at this sparsity; paper_composed: with TeaCache; None where there is none
    steps_for_composed   most computed steps with which `paper_composed` is reached, None where it never is
    """

    model: str
    size: str
    name: str
    how: str
    dense: str
    sparsity: float
    density: float
    preset: str
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
