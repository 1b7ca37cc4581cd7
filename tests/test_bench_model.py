"""`rectified-spaattn bench model` on a CPU: architectures, checks, scaling, runs, files and the command."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.benchmark import model as bench
from rectified_spaattn.benchmark import modes, timing
from rectified_spaattn.benchmark.check import BenchError
from rectified_spaattn.benchmark.model import MeasuredModel, ModelSettings, measure
from rectified_spaattn.benchmark.model_check import check_first_runs, check_model
from rectified_spaattn.benchmark.model_rows import Key, forward_rows, schedule_rows
from rectified_spaattn.benchmark.models import MODELS, tiny
from rectified_spaattn.benchmark.modes import REMOVED, Mode
from rectified_spaattn.benchmark.record import ForwardRow, ScheduleRow, read_csv
from rectified_spaattn.benchmark.schedule import line, mixed_forward, most_computed, schedule
from rectified_spaattn.benchmark.shapes import Case
from rectified_spaattn.benchmark.timing import Timed, durations
from rectified_spaattn.benchmark.weights import build, compile_blocks, exact, inputs_for, output, shallow_copy
from rectified_spaattn.cli.app import app
from rectified_spaattn.pipelines import ADAPTERS
from rectified_spaattn.pipelines.state import LayerState

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAST = {"size": "tiny", "dtype": "float32", "block_size": 64, "repeats": 2, "device": "cpu", "compiler": None}
OPTIONS = ["--size", "tiny", "--dtype", "float32", "--block-size", "64", "--repeats", "2", "--device", "cpu"]
DENSE, SPARSE = Mode("dense", "cudnn"), Mode("sparse", "triton", 0.8895)


def run(name: str, **changes: Any) -> MeasuredModel:
    return measure(name, ModelSettings(**{**FAST, "models": (name,), **changes}), lambda what, done, total: None)


# --- the architectures


@pytest.mark.parametrize(
    ("name", "billions", "layers", "tokens"),
    [
        ("hunyuan-video", 12.82, 60, 115_456),
        ("wan2.1-14b", 14.29, 40, 75_600),
        ("wan2.1-14b-i2v", 16.39, 40, 75_600),
        ("wan2.2-ti2v-5b", 5.00, 30, 27_280),
        ("cogvideox1.5-5b", 5.57, 42, 45_106),
        ("flux.1-dev", 11.90, 57, 66_048),
    ],
)
def test_full_size_models_are_the_published_ones(name: str, billions: float, layers: int, tokens: int) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer)(**model.arguments(model.units))
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.units * model.layers_a_unit == layers
    assert model.shape.tokens == tokens
    assert model.shape.heads * model.shape.head_dim == transformer.config.num_attention_heads * (
        transformer.config.attention_head_dim
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_random_weights_are_made_in_half_precision_and_shared_by_copies(name: str) -> None:
    model = tiny(MODELS[name])
    default = torch.get_default_dtype()
    whole = build(model, 2, CPU, torch.bfloat16)
    assert torch.get_default_dtype() == default
    kept = type(whole)._keep_in_fp32_modules or ()
    for path, parameter in whole.named_parameters():
        wide = any(part in path.split(".") for part in kept)
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), path
    inputs = inputs_for(model, model.shape.grid, CPU, torch.bfloat16)
    got, want = output(whole, inputs), exact(whole, inputs)
    assert want.dtype == torch.float32
    assert got.isfinite().all()
    assert 0 < (got - want).norm() / want.norm() < 0.03

    one = shallow_copy(whole, model, 1)
    theirs = {parameter.data_ptr() for parameter in whole.parameters()}
    assert all(parameter.data_ptr() in theirs for parameter in one.parameters())
    assert sum(1 for _ in one.parameters()) < sum(1 for _ in whole.parameters())
    assert not torch.equal(output(one, inputs), got)
    assert torch.equal(output(shallow_copy(whole, model, 2), inputs), got)
    assert torch.equal(output(build(model, 2, CPU, torch.bfloat16), inputs), got)  # the seed is fixed
    ours, stock = ({id(each) for each in m.attn_processors.values()} for m in (one, whole))
    assert not ours & stock


# --- one model, end to end


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_measured_or_refused(name: str) -> None:
    model = tiny(MODELS[name])
    if model.transformer not in ADAPTERS:
        with pytest.raises(BenchError, match="does not support yet"):
            run(name)
        return
    done = run(name, sparsities=(0.75,), units=2)
    assert [(row.kind, row.name, row.sparsity) for row in done.forwards] == [
        ("dense", "sdpa", None),
        ("sparse", "torch", 0.75),
        ("removed", "none", None),
    ]
    video, text, block = model.shape.video, model.shape.text, 64
    blocks = video // block
    for row in done.forwards:
        assert row.seconds_min <= row.seconds_q1 <= row.seconds <= row.seconds_q3 <= row.seconds_max
        assert row.measured_s is None
        assert row.layers_low == model.layers_a_unit < row.layers_high < row.layers == 6 * model.layers_a_unit
        assert row.constant_s + row.unit_s * row.layers_high / model.layers_a_unit == pytest.approx(row.high_s)
        if row.sparsity is not None:
            kept = math.floor((1 - row.sparsity) * blocks + 1e-9)
            alone = video - blocks * block + text
            pairs = blocks * kept * block**2 + blocks * block * alone + alone * (video + text)
            assert row.density == pytest.approx(pairs / (video + text) ** 2)
        else:
            assert row.density is None
    assert [row.sparsity for row in done.schedules] == [0.75]
    assert len(done.checks) == 2


def test_compiled_forwards_share_one_graph_and_are_compared_with_eager_ones() -> None:
    torch._dynamo.utils.counters.clear()
    done = run("wan2.1-14b", sparsities=(0.5, 0.75), compiler="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [(row.kind, row.how) for row in done.forwards] == [
        (kind, how) for kind in ("dense", "sparse", "sparse", "removed") for how in ("eager", "compiled")
    ]
    assert sum("compiled" in each.what for each in done.checks) == 4
    assert [(row.sparsity, row.how) for row in done.schedules] == [
        (sparsity, how) for sparsity in (0.5, 0.75) for how in ("eager", "compiled")
    ]


def test_unasked_sparsities_are_the_presets_the_papers_and_a_high_one() -> None:
    def asked(name: str) -> list[float | None]:
        model, settings = MODELS[name], ModelSettings(models=(name,), device="cpu", baselines=("sdpa",))
        case = Case(model.shape, 128, torch.float32, CPU)
        found, not_run = bench._modes(model, settings, case)
        assert not_run == {}
        return [mode.sparsity for mode in found if mode.kind == "sparse"]

    assert asked("hunyuan-video") == [0.797, 0.8, 0.8895]
    assert asked("wan2.1-14b") == [0.75, 0.797, 0.8895]
    assert asked("wan2.1-14b-i2v") == [0.75, 0.839, 0.8895]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_kind_of_layer_is_compiled(name: str) -> None:
    model = tiny(MODELS[name])
    whole = build(model, 2, CPU, torch.float32)
    compile_blocks(whole, model, "eager")
    compiled = [type(each).__name__ for each in whole.modules() if each._compiled_call_impl is not None]
    layers = [each for each in compiled if each.endswith(("TransformerBlock", "CogVideoXBlock"))]
    assert len(layers) == 2 * model.layers_a_unit


# --- checks


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(bench, "durations", refuse)


WRONG: dict[str, Callable[..., Any]] = {
    "not finite": lambda out, plan: (out * torch.nan, plan),
    "one per cent off": lambda out, plan: (out * 1.01, plan),
    "tokens in another order": lambda out, plan: (out.roll(1, dims=1), plan),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_wrong_attention_is_refused_before_anything_is_timed(
    change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, no_timing: None
) -> None:
    right = BACKENDS["torch"]
    wrong = right._replace(run=lambda *arguments: change(*right.run(*arguments)))
    monkeypatch.setitem(BACKENDS, "torch", wrong)
    with pytest.raises(BenchError, match=r"sparse attention: got a relative error of .*allowed.*Nothing was timed"):
        run("wan2.1-14b", sparsities=(0.5,))


def test_a_model_that_ignores_its_attention_proves_nothing(monkeypatch: pytest.MonkeyPatch, no_timing: None) -> None:
    monkeypatch.setattr(modes, "_copy_v", modes.BASELINES["sdpa"].run)
    with pytest.raises(BenchError, match="same output without attention"):
        run("wan2.1-14b", sparsities=(0.5,))


@torch.no_grad()
def test_the_budget_is_the_untouched_models_own_error() -> None:
    model = tiny(MODELS["wan2.1-14b"])
    weights = build(model, 1, CPU, torch.bfloat16)
    case = Case(model.shape, 64, torch.bfloat16, CPU)
    checks = check_model(weights, model, [Mode("dense", "sdpa"), Mode("sparse", "torch", 0.9), REMOVED], case)
    assert [each.what.split()[-2] for each in checks] == ["dense", "sparse"]
    assert all(0 < each.error < each.allowed < 0.03 for each in checks)
    assert all(not hasattr(each, "rectified_layer") for each in weights.attn_processors.values())


def test_first_runs_must_be_finite_and_compiled_ones_equal_eager_ones() -> None:
    def runs(**changes: torch.Tensor) -> dict[Key, torch.Tensor]:
        x = torch.arange(1.0, 5.0)
        found = {"dense_eager": x, "dense_compiled": x, "sparse_eager": 1.1 * x, "sparse_compiled": 1.1 * x, **changes}
        by_name = {"dense": DENSE, "sparse": SPARSE}
        return {Key(by_name[name.split("_")[0]], name.split("_")[1], 1): out for name, out in found.items()}

    x = torch.arange(1.0, 5.0)
    assert [each.error for each in check_first_runs("m", runs(), 0.01)] == [0.0, 0.0]
    near = check_first_runs("m", runs(sparse_compiled=1.15 * x), 0.01)  # another choice of blocks
    assert near[1].error == pytest.approx(0.05 / 1.1, rel=1e-5)
    with pytest.raises(BenchError, match="infinite values or NaN from sparse triton"):
        check_first_runs("m", runs(sparse_eager=x / 0), 0.01)
    for wrong in ({"dense_compiled": 1.03 * x}, {"sparse_compiled": 1.4 * x}):
        with pytest.raises(BenchError, match="compiled: got a relative error"):
            check_first_runs("m", runs(**wrong), 0.01)


def test_a_call_that_ran_dense_is_refused(monkeypatch: pytest.MonkeyPatch, no_timing: None) -> None:
    monkeypatch.setattr(LayerState, "why_dense", lambda *_: "a reason")
    with pytest.raises(BenchError, match=r"0 sparse and 1 dense attention calls \{'a reason': 1\}"):
        run("wan2.1-14b", sparsities=(0.5,))


# --- scaling, and runs


def test_the_scaling_rule_gives_what_a_clock_measures_with_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    model, rounds = MODELS["hunyuan-video"], 3
    unit = {(DENSE, "eager"): 1.0, (DENSE, "compiled"): 0.9, (SPARSE, "eager"): 0.3, (SPARSE, "compiled"): 0.2}

    def forward(kind: tuple[Mode, str], units: int) -> Callable[[int], None]:
        def call(_: int) -> None:
            nonlocal now
            now += 0.25 + unit[kind] * units

        return call

    def measured(depths: tuple[int, ...]) -> dict[Key, list[float]]:
        keys = [Key(*kind, n) for kind in unit for n in depths]
        calls = {str(key): Timed(forward((key.mode, key.how), key.units), rounds) for key in keys}
        found = durations(calls, 1, CPU, lambda done, total: None, warm_up=0)
        return {key: found[str(key)] for key in keys}

    case = Case(model.shape, 128, torch.bfloat16, CPU)
    rows = forward_rows(model, "full", case, measured((1, 2)), measured((20,)), {SPARSE: 0.12})
    for row in rows:
        assert row.seconds == pytest.approx(0.25 + 20 * unit[Mode(row.kind, row.name, row.sparsity), row.how])
        assert row.measured_s == pytest.approx(row.seconds)
        assert (row.layers_low, row.layers_high, row.layers, row.repeats) == (3, 6, 60, 3)
        assert row.constant_s == pytest.approx(0.25)
        assert row.ratio == pytest.approx(20.25 / row.seconds)
    assert [row.density for row in rows] == [None, None, 0.12, 0.12]


def test_scaled_times_spread_as_the_rounds_do() -> None:
    model, case = MODELS["wan2.1-14b"], Case(MODELS["wan2.1-14b"].shape, 128, torch.bfloat16, CPU)
    seconds = {Key(DENSE, "eager", 1): [1.0, 1.0, 1.0], Key(DENSE, "eager", 3): [3.0, 3.2, 2.8]}
    (row,) = forward_rows(model, "full", case, seconds, {}, {})
    assert (row.seconds_min, row.seconds, row.seconds_max) == pytest.approx((36.1, 40.0, 43.9))  # 1 + 39 * (x - 1) / 2
    assert row.measured_s is None


def wan_rows(**changes: float) -> list[ForwardRow]:
    """Constant 0.5 s; a layer takes 0.3 s dense and 0.1 s sparse eager, 0.25 s and 0.05 s compiled."""
    model = MODELS["wan2.1-14b"]
    unit = {(DENSE, "eager"): 0.3, (DENSE, "compiled"): 0.25, (SPARSE, "eager"): 0.1, (SPARSE, "compiled"): 0.05}
    seconds = {Key(*kind, n): [0.5 + each * n] * 2 for kind, each in unit.items() for n in (1, 3)}
    return forward_rows(model, "full", Case(model.shape, 128, torch.bfloat16, CPU), seconds, {}, {SPARSE: 0.11})


def test_a_run_is_the_sum_of_its_steps() -> None:
    """By hand: dense forward 0.5 + 40 * 0.3 = 12.5 s, so 50 steps of two calls take 1,250 s. Sparse eager: two of 40
    layers dense, 0.5 + 38 * 0.1 + 2 * 0.3 = 4.9 s; 2 * (5 * 12.5 + 45 * 4.9) = 566 s. Compiled: dense 10.5 s, sparse
    0.5 + 38 * 0.05 + 2 * 0.25 = 2.9 s; 2 * (5 * 10.5 + 45 * 2.9) = 366 s.
    """
    eager, compiled = schedule_rows(MODELS["wan2.1-14b"], schedule(50, 50, 5, 2), "", wan_rows())
    assert (eager.dense_forward_s, eager.sparse_forward_s, eager.total_s) == pytest.approx((12.5, 4.9, 566.0))
    assert (compiled.dense_forward_s, compiled.sparse_forward_s, compiled.total_s) == pytest.approx((10.5, 2.9, 366.0))
    assert eager.dense_total_s == compiled.dense_total_s == pytest.approx(1250.0)
    assert (eager.speedup, compiled.speedup) == pytest.approx((1250 / 566, 1250 / 366))
    assert (eager.dense_steps, eager.dense_layers, eager.calls) == (5, 2, 2)
    assert eager.paper is None  # none is published for text to video at 0.8895
    # 1250 / 4.61 = 271.1 s: eager 125 + 9.8 (n - 5), n = 19.9; compiled 105 + 5.8 (n - 5), n = 33.6
    assert (eager.steps_for_composed, compiled.steps_for_composed) == (19, 33)

    cached = schedule_rows(MODELS["wan2.1-14b"], schedule(50, 20, 5, 2), "a log", wan_rows())
    assert cached[0].total_s == pytest.approx(2 * (5 * 12.5 + 15 * 4.9))
    assert (cached[0].computed_steps, cached[0].source) == (20, "a log")


def test_published_figures_stand_beside_the_sparsity_they_are_for() -> None:
    model = MODELS["hunyuan-video"]
    at = [Mode("sparse", "triton", sparsity) for sparsity in (0.797, 0.8, 0.8895)]
    seconds = {Key(mode, "eager", n): [0.1 * n] * 2 for mode in (DENSE, *at) for n in (1, 2)}
    case = Case(model.shape, 128, torch.bfloat16, CPU)
    rows = forward_rows(model, "full", case, seconds, {}, dict.fromkeys(at, 0.2))
    made = schedule_rows(model, schedule(50, 50, 0, 1), "", rows)
    assert [(row.paper, row.paper_composed) for row in made] == [(2.50, 5.24), (None, 5.24), (3.33, 5.24)]


def test_schedule_arithmetic_refuses_what_it_cannot_know() -> None:
    assert line(2.0, 5.0, 1, 4) == (1.0, 1.0)
    with pytest.raises(ValueError, match="units: got 2 and 2"):
        line(1.0, 1.0, 2, 2)
    with pytest.raises(ValueError, match="a unit has 3 layers"):
        mixed_forward(line(1.0, 2.0, 1, 2), line(2.0, 4.0, 1, 2), 20, 2, 3)
    for arguments in ((50, 51, 0, 1), (50, 4, 5, 1), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match=r"steps: got .*allowed"):
            schedule(*arguments)
    plan = schedule(50, 50, 5, 1)
    assert most_computed(plan, 10.0, 1.0, 50.0) == 5
    assert most_computed(plan, 10.0, 1.0, 49.0) is None
    assert most_computed(plan, 10.0, 1.0, 1000.0) == 50


# --- settings and the command


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": ("sora",)}, r"model: got 'sora'; allowed: .*hunyuan-video"),
        ({"models": ()}, "model: got none"),
        ({"size": "huge"}, "size: got 'huge'"),
        ({"baselines": ("fa5",)}, "baseline: got 'fa5'"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"rectify": "mean"}, "rectify: got 'mean'"),
        ({"order": "peano"}, "order: got 'peano'"),
        ({"repeats": 1}, "repeats: got 1; allowed: 2 or more"),
        ({"sparsities": (1.0,)}, "sparsity: got 1.0"),
        ({"sparsities": (0.5, 0.5)}, "sparsity: got"),
        ({"units": 1}, "units: got 1; allowed for hunyuan-video: 2 to 20"),
        ({"size": "tiny", "block_size": 512}, "block_size: got 512; allowed for hunyuan-video"),
        ({"computed_steps": 20}, "computed steps: got 20 from ''; allowed: both or neither"),
        ({"computed_steps": 60, "source": "x"}, "computed steps: got 60; allowed: 0 to 50"),
        ({"computed_steps": 20, "source": "x", "models": ("wan2.1-14b", "flux.1-dev")}, "got 2 models"),
        ({"computed_steps": 4, "source": "x", "models": ("wan2.1-14b",)}, "got 4; allowed: 5 to 50"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelSettings(**changes)


def test_what_cannot_run_is_an_error_where_asked_for(no_timing: None) -> None:
    with pytest.raises(BenchError, match=r"baseline fa4: .*allowed for wan2.1-14b here: \['sdpa'\]"):
        run("wan2.1-14b", baselines=("sdpa", "fa4"))
    with pytest.raises(BenchError, match=r"cannot run torch\.float32 on cpu"):
        run("wan2.1-14b", backend="fa4")
    with pytest.raises(BenchError, match="backend: got 'fast'"):
        run("wan2.1-14b", backend="fast")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "model", *arguments], env={"COLUMNS": "60"})


def test_command_prints_markdown_tables_and_writes_files_that_can_be_read_back(tmp_path: Path) -> None:
    done = invoke(
        "wan2.1-14b", *OPTIONS, "--compiler", "aot_eager", "--sparsity", "0.75", "--full", "--steps", "20",
        "--computed-steps", "8", "--computed-steps-source", "a test", "--csv-dir", str(tmp_path / "new"),
        "--rectify", "row", "--order", "content",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    forwards, made_on = read_csv(tmp_path / "new" / "model-forward.csv", ForwardRow)
    runs, _ = read_csv(tmp_path / "new" / "model-schedule.csv", ScheduleRow)
    assert [(row.kind, row.how) for row in forwards] == [
        (kind, how) for kind in ("dense", "sparse", "removed") for how in ("eager", "compiled")
    ]
    assert {(row.rectify, row.order) for row in (*forwards, *runs)} == {("row", "content")}
    assert "float32, row, content, random weights" in done.output
    assert made_on.command.startswith("rectified-spaattn")
    lines = done.output.splitlines()
    for row, label in zip(forwards[::2], ("dense sdpa", "torch", "attention removed"), strict=True):
        shown = [part.strip() for part in next(each for each in lines if each.startswith(f"| {label} ")).split("|")]
        assert f"{row.seconds:.3f}" in shown
        assert f"{row.ratio:.2f}x" in shown
    assert any(
        re.match(r"wan2.1-14b: a run of 20 steps, 8 computed \(a test\), 2 forward.* 2 dense steps and 2 ", each)
        for each in lines
    )
    assert [(row.steps, row.computed_steps, row.dense_steps, row.source) for row in runs] == [(20, 8, 2, "a test")] * 2
    for row in runs:
        dense = next(each for each in forwards if (each.kind, each.how) == ("dense", row.how))
        assert row.dense_forward_s == dense.seconds
        assert row.total_s == pytest.approx(2 * (2 * row.dense_forward_s + 6 * row.sparse_forward_s))
        assert row.dense_total_s == pytest.approx(40 * forwards[0].seconds)
        assert f"{row.speedup:.2f}x" in done.output
    assert "Scaled, round by round: t(1) + 5 * (t(3) - t(1)) / 2" in done.output
    assert "off by" in done.output
    measured = [(row.kind, row.how) for row in forwards if row.measured_s is not None and row.measured_s > row.low_s]
    assert measured == [("dense", "eager"), ("sparse", "compiled")]


@pytest.mark.parametrize(("rectify", "order"), [("ipar+gapr", "gilbert"), ("row", "content")])
def test_layers_run_what_the_rows_say(rectify: Any, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = []
    monkeypatch.setattr(bench, "enable", lambda *given: handles.append(modes.enable(*given)) or handles[-1])
    asked = {} if order == "gilbert" else {"rectify": rectify, "order": order}  # what bench model starts from
    done = run("wan2.1-14b", sparsities=(0.75,), **asked)
    assert {(row.rectify, row.order) for row in (*done.forwards, *done.schedules)} == {(rectify, order)}
    configs = [each.state.config for handle in handles for each in handle._enabled]
    assert {(each.rectify, each.order) for each in configs} == {(rectify, order)}
    assert not any(each.neighbours or each.first_frame for each in configs)


def test_published_rows_can_be_read() -> None:
    for name, kind in (("model-forward.csv", ForwardRow), ("model-schedule.csv", ScheduleRow)):
        rows, _ = read_csv(Path(__file__).parents[1] / "docs" / "data" / name, kind)
        assert {(row.rectify, row.order) for row in rows} == {("ipar+gapr", "gilbert")}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["wan2.1-14b", "--device", "cpu"], 1, "--size tiny"),
        (["wan2.1-14b", *OPTIONS, "--baseline", "cudnn"], 1, "needs a CUDA GPU"),
        (["sora"], 2, "got 'sora'"),
        (["wan2.1-14b", "--computed-steps", "9"], 2, "both or neither"),
        ([], 2, "Missing argument"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], code: int, told: str) -> None:
    done = CliRunner().invoke(app, ["bench", "model", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == code
    assert told in done.output


def test_help_names_the_models_and_options() -> None:
    printed = CliRunner().invoke(app, ["bench", "model", "--help"], env={"COLUMNS": "250"}).output
    for part in (
        *MODELS,
        "--units",
        "--full",
        "--no-compile",
        "--computed-steps-source",
        "--csv-dir",
        "--sparsity",
        "--rectify",
        "--order",
    ):
        assert part in printed
