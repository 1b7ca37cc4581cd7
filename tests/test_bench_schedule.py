"""From timed forwards to whole models and denoising runs: arithmetic that can be checked by hand."""

from collections.abc import Callable

import pytest
import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.bench import timing
from rectified_spaattn.lab.bench.model_rows import Key, forward_rows, schedule_rows
from rectified_spaattn.lab.bench.models import MODELS
from rectified_spaattn.lab.bench.rows import ForwardRow, Schedule
from rectified_spaattn.lab.bench.shapes import Case, Variant
from rectified_spaattn.lab.bench.timing import Timed, durations

CPU = torch.device("cpu")
DENSE, SPARSE = Variant("dense", "cudnn"), Variant("sparse", "triton", 0.8895)


def case_of(name: str) -> Case:
    return Case(MODELS[name].shape, SparseConfig(), torch.bfloat16, CPU)


def test_the_scaling_rule_gives_what_a_clock_measures_with_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    model, rounds = MODELS["hunyuan-video"], 3
    unit = {(DENSE, "eager"): 1.0, (DENSE, "compiled"): 0.9, (SPARSE, "eager"): 0.3, (SPARSE, "compiled"): 0.2}

    def forward(kind: tuple[Variant, str], units: int) -> Callable[[int], None]:
        def call(_: int) -> None:
            nonlocal now
            now += 0.25 + unit[kind] * units

        return call

    def measured(depths: tuple[int, ...]) -> dict[Key, list[float]]:
        keys = [Key(*kind, n) for kind in unit for n in depths]
        calls = {key: Timed(forward((key.variant, key.how), key.units), rounds) for key in keys}
        return durations(calls, 1, CPU, lambda finished, total: None, warm_up=0)

    rows = forward_rows(model, "full", case_of(model.name), measured((1, 2)), measured((20,)), {SPARSE: 0.12}, {})
    for row in rows:
        assert row.seconds == pytest.approx(0.25 + 20 * unit[Variant(row.kind, row.name, row.sparsity), row.how])
        assert row.measured_s == pytest.approx(row.seconds)
        assert (row.layers_low, row.layers_high, row.layers, row.repeats) == (3, 6, 60, 3)
        assert row.constant_s == pytest.approx(0.25)
        assert row.ratio == pytest.approx(20.25 / row.seconds)
    assert [row.density for row in rows] == [None, None, 0.12, 0.12]


def test_scaled_times_spread_as_the_rounds_do() -> None:
    model = MODELS["wan2.1-14b"]
    seconds = {Key(DENSE, "eager", 1): [1.0, 1.0, 1.0], Key(DENSE, "eager", 3): [3.0, 3.2, 2.8]}
    memory = {Key(DENSE, "eager", 3): 5 << 30}
    (row,) = forward_rows(model, "full", case_of(model.name), seconds, {}, {}, memory)
    assert (row.seconds_min, row.seconds, row.seconds_max) == pytest.approx((36.1, 40.0, 43.9))  # 1 + 39 * (x - 1) / 2
    assert row.measured_s is None
    assert row.memory_gib == 5.0


def wan_rows() -> list[ForwardRow]:
    """Constant 0.5 s; a layer takes 0.3 s dense and 0.1 s sparse eager, 0.25 s and 0.05 s compiled."""
    model = MODELS["wan2.1-14b"]
    unit = {(DENSE, "eager"): 0.3, (DENSE, "compiled"): 0.25, (SPARSE, "eager"): 0.1, (SPARSE, "compiled"): 0.05}
    seconds = {Key(*kind, n): [0.5 + each * n] * 2 for kind, each in unit.items() for n in (1, 3)}
    return forward_rows(model, "full", case_of(model.name), seconds, {}, {SPARSE: 0.11}, {})


def test_a_run_is_the_sum_of_its_steps() -> None:
    """By hand: dense forward 0.5 + 40 * 0.3 = 12.5 s, so 50 steps of two calls take 1,250 s. Sparse eager: two of 40
    layers dense, 0.5 + 38 * 0.1 + 2 * 0.3 = 4.9 s; 2 * (5 * 12.5 + 45 * 4.9) = 566 s. Compiled: dense 10.5 s, sparse
    0.5 + 38 * 0.05 + 2 * 0.25 = 2.9 s; 2 * (5 * 10.5 + 45 * 2.9) = 366 s.
    """
    eager, compiled = schedule_rows(MODELS["wan2.1-14b"], Schedule(50, 50, 5, 2, 2), wan_rows())
    assert (eager.dense_forward_s, eager.sparse_forward_s, eager.total_s) == pytest.approx((12.5, 4.9, 566.0))
    assert (compiled.dense_forward_s, compiled.sparse_forward_s, compiled.total_s) == pytest.approx((10.5, 2.9, 366.0))
    assert eager.dense_total_s == compiled.dense_total_s == pytest.approx(1250.0)
    assert (eager.speedup, compiled.speedup) == pytest.approx((1250 / 566, 1250 / 366))
    assert (eager.dense_steps, eager.dense_layers, eager.calls) == (5, 2, 2)
    assert eager.paper is None  # none is published for text to video at 0.8895
    # 1250 / 4.61 = 271.1 s: eager 125 + 9.8 (n - 5), n = 19.9; compiled 105 + 5.8 (n - 5), n = 33.6
    assert (eager.steps_for_composed, compiled.steps_for_composed) == (19, 33)

    cached = schedule_rows(MODELS["wan2.1-14b"], Schedule(50, 20, 5, 2, 2, "wan2.1-t2v", "a log"), wan_rows())
    assert cached[0].total_s == pytest.approx(2 * (5 * 12.5 + 15 * 4.9))
    assert (cached[0].computed_steps, cached[0].source) == (20, "a log")


def test_published_figures_stand_beside_the_sparsity_they_are_for() -> None:
    model = MODELS["hunyuan-video"]
    at = [Variant("sparse", "triton", sparsity) for sparsity in (0.797, 0.8, 0.8895)]
    seconds = {Key(mode, "eager", n): [0.1 * n] * 2 for mode in (DENSE, *at) for n in (1, 2)}
    rows = forward_rows(model, "full", case_of(model.name), seconds, {}, dict.fromkeys(at, 0.2), {})
    made = schedule_rows(model, Schedule(50, 50, 0, 1), rows)
    assert [(row.paper, row.paper_composed) for row in made] == [(2.50, 5.24), (None, 5.24), (3.33, 5.24)]


def test_a_dense_layer_of_a_unit_of_several_costs_their_mean() -> None:
    model = MODELS["hunyuan-video"]  # units of three layers
    seconds = {Key(each, "eager", n): [cost * n] * 2 for each, cost in ((DENSE, 9.0), (SPARSE, 3.0)) for n in (1, 2)}
    rows = forward_rows(model, "full", case_of(model.name), seconds, {}, {SPARSE: 0.12}, {})
    (row,) = schedule_rows(model, Schedule(50, 50, 0, 1, 2), rows)
    assert row.sparse_forward_s == pytest.approx(20 * 3.0 + 2 * (9.0 - 3.0) / 3)


def test_schedule_arithmetic_refuses_what_it_cannot_know() -> None:
    for values in ((50, 51, 0, 1), (50, 4, 5, 1), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match=r"steps: got .*allowed"):
            Schedule(*values)
    plan = Schedule(50, 50, 5, 1)
    assert plan.most_computed(10.0, 1.0, 50.0) == 5
    assert plan.most_computed(10.0, 1.0, 49.0) is None
    assert plan.most_computed(10.0, 1.0, 1000.0) == 50
