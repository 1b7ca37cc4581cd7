"""`rectified-spaattn bench model` on a CPU: architectures, checks, one model end to end, and the command."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn import SparseConfig
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.cli.app import app
from rectified_spaattn.lab.bench import model as bench
from rectified_spaattn.lab.bench import weights
from rectified_spaattn.lab.bench.model import ModelResult, ModelSettings, measure
from rectified_spaattn.lab.bench.model_check import check_first_runs, check_model
from rectified_spaattn.lab.bench.model_rows import Key
from rectified_spaattn.lab.bench.models import MODELS, tiny
from rectified_spaattn.lab.bench.rows import ForwardRow, ScheduleRow
from rectified_spaattn.lab.bench.shapes import REMOVED, BenchError, Case, Variant
from rectified_spaattn.lab.bench.weights import (
    build,
    compile_blocks,
    exact,
    inputs_for,
    output,
    shallow_copy,
    weight_bytes,
)
from rectified_spaattn.pipelines.state import LayerState
from studies.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAST = {"size": "tiny", "dtype": "float32", "block_size": 64, "repeats": 2, "device": "cpu", "compile": False}
OPTIONS = ["--size", "tiny", "--dtype", "float32", "--block-size", "64", "--repeats", "2", "--device", "cpu"]
DENSE, SPARSE = Variant("dense", "cudnn"), Variant("sparse", "triton", 0.8895)


def run(name: str, **changes: Any) -> ModelResult:
    return measure(name, ModelSettings(**{**FAST, "model": (name,), **changes}), lambda what, finished, total: None)


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
        ("minimax-h3", 33.12, 50, 38_124),
        ("ltx-2.5", 18.99, 48, 32_640),
        ("kandinsky-6", 48.19, 60, 47_616),
        ("cosmos-3", 15.16, 36, 44_672),
        ("motif-video", 2.00, 36, 114_592),
    ],
)
def test_full_size_models_are_the_published_ones(name: str, billions: float, layers: int, tokens: int) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer)(**model.arguments(model.units))
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.units * model.layers_a_unit == layers
    assert model.shape.tokens == tokens
    sizes = {name: size for name, size in model.heads(model.shape).items() if size is not None}
    assert {name: transformer.config[name] for name in sizes} == sizes


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
    complete = build(model, model.units, CPU, torch.bfloat16)
    held = sum(parameter.nbytes for parameter in complete.parameters())
    assert weight_bytes(whole, model, 2) == held > weight_bytes(whole, replace(model, units=2), 2)
    ours, stock = ({id(each) for each in m.attn_processors.values()} for m in (one, whole))
    assert not ours & stock


# --- one model, end to end


@pytest.fixture
def not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards are checked and run once; then a unit takes a second in the first round and two in the second."""
    monkeypatch.setattr(
        bench, "durations", lambda calls, *_, **__: {key: [key.units, 2.0 * key.units] for key in calls}
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("quiet", "not_timed")
def test_every_model_is_measured_without_a_warning(name: str) -> None:
    model = tiny(MODELS[name])
    result = run(name, sparsity=(0.75,))
    assert [(row.kind, row.name, row.sparsity) for row in result.forwards] == [
        ("dense", "sdpa", None),
        ("sparse", "torch", 0.75),
        ("removed", "none", None),
    ]
    video, block = model.shape.video, 64
    blocks = video // block

    def density(sparsity: float, text: int) -> float:
        kept = math.floor((1 - sparsity) * blocks + 1e-9)
        alone = video - blocks * block + text
        pairs = blocks * kept * block**2 + blocks * block * alone + alone * (video + text)
        pairs += blocks * block * (blocks - kept)  # one pooled key a dropped block and query
        return pairs / (video + text) ** 2

    for row in result.forwards:
        assert (row.seconds_min, row.seconds, row.seconds_max) == (6, 9, 12)
        assert row.measured_s is None
        assert row.layers_low == model.layers_a_unit < row.layers_high < row.layers == 6 * model.layers_a_unit
        assert (row.low_s, row.high_s) == (1.5, 1.5 * row.layers_high / model.layers_a_unit)
        assert (row.unit_s, row.constant_s) == (1.5, 0)
        if row.sparsity is not None:
            decoders = model.config.get("num_decoder_layers", 0) / row.layers_high  # which attend over the video alone
            mean = decoders * density(row.sparsity, 0) + (1 - decoders) * density(row.sparsity, model.shape.text)
            assert row.density == pytest.approx(mean)
        else:
            assert row.density is None
    assert [row.sparsity for row in result.schedules] == [0.75]
    assert len(result.checks) == 2


def test_compiled_forwards_share_one_graph_and_are_compared_with_eager_ones() -> None:
    torch._dynamo.utils.counters.clear()
    result = run("wan2.1-14b", sparsity=(0.5, 0.75), compile=True, compiler="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [(row.kind, row.how) for row in result.forwards] == [
        (kind, how) for kind in ("dense", "sparse", "sparse", "removed") for how in ("eager", "compiled")
    ]
    assert sum("compiled" in each.what for each in result.checks) == 4
    assert [(row.sparsity, row.how) for row in result.schedules] == [
        (sparsity, how) for sparsity in (0.5, 0.75) for how in ("eager", "compiled")
    ]


def test_unasked_sparsities_are_the_presets_the_papers_and_a_high_one() -> None:
    def asked(name: str) -> list[float | None]:
        model, settings = MODELS[name], ModelSettings(model=(name,), device="cpu", baseline=("sdpa",))
        variants, not_run = bench._variants(model, settings, Case(model.shape, settings.config(), torch.float32, CPU))
        assert not_run == {}
        return [variant.sparsity for variant in variants if variant.kind == "sparse"]

    assert asked("hunyuan-video") == [0.797, 0.8, 0.8895]
    assert asked("wan2.1-14b") == [0.75, 0.797, 0.8895]
    assert asked("wan2.1-14b-i2v") == [0.75, 0.839, 0.8895]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_kind_of_layer_is_compiled(name: str) -> None:
    model = tiny(MODELS[name])
    whole = build(model, 2, CPU, torch.float32)
    compile_blocks(whole, "eager")
    compiled = [type(each).__name__ for each in whole.modules() if each._compiled_call_impl is not None]
    kinds = {type(block).__name__ for name in weights._block_lists(whole) for block in getattr(whole, name)}
    assert sum(each in kinds for each in compiled) == 2 * model.layers_a_unit


# --- checks


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(bench, "durations", refuse)


WRONG: dict[str, Callable[..., Any]] = {
    "not finite": lambda out: out * torch.nan,
    "one per cent off": lambda out: out * 1.01,
    "tokens in another order": lambda out: out.roll(1, dims=1),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_wrong_attention_is_refused_before_anything_is_timed(
    change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, no_timing: None
) -> None:
    right = BACKENDS["torch"]
    wrong = right._replace(attend=lambda *arguments: change(right.attend(*arguments)))
    monkeypatch.setitem(BACKENDS, "torch", wrong)
    with pytest.raises(BenchError, match=r"sparse attention: got a relative error of .*allowed.*Nothing was timed"):
        run("wan2.1-14b", sparsity=(0.5,))


def test_a_model_that_ignores_its_attention_proves_nothing(monkeypatch: pytest.MonkeyPatch, no_timing: None) -> None:
    monkeypatch.setattr(weights, "_copy_v", weights.BASELINES["sdpa"].run)
    with pytest.raises(BenchError, match="same output without attention"):
        run("wan2.1-14b", sparsity=(0.5,))


@torch.no_grad()
def test_the_budget_is_the_untouched_models_own_error() -> None:
    model = tiny(MODELS["wan2.1-14b"])
    whole = build(model, 1, CPU, torch.bfloat16)
    case = Case(model.shape, SparseConfig(block_size=64), torch.bfloat16, CPU)
    checks = check_model(whole, model, [Variant("dense", "sdpa"), Variant("sparse", "torch", 0.9), REMOVED], case)
    assert [each.what.split()[-2] for each in checks] == ["dense", "sparse"]
    assert all(0 < each.error < each.allowed < 0.03 for each in checks)
    assert all(not hasattr(each, "rectified_layer") for each in whole.attn_processors.values())


def test_first_runs_must_be_finite_and_compiled_ones_equal_eager_ones() -> None:
    def runs(**changes: torch.Tensor) -> dict[Key, torch.Tensor]:
        x = torch.arange(1.0, 5.0)
        same = {"dense_eager": x, "dense_compiled": x, "sparse_eager": 1.1 * x, "sparse_compiled": 1.1 * x}
        by_name = {"dense": DENSE, "sparse": SPARSE}
        return {Key(by_name[name.split("_")[0]], name.split("_")[1], 1): out for name, out in (same | changes).items()}

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
        run("wan2.1-14b", sparsity=(0.5,))


# --- settings and the command


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": ("sora",)}, r"model: got 'sora'; allowed: .*hunyuan-video"),
        ({"size": "huge"}, "size: got 'huge'"),
        ({"baseline": ("fa5",)}, "baseline: got 'fa5'"),
        ({"order": "peano"}, "order: got 'peano'"),
        ({"sparsity": (1.0,)}, "sparsity: got 1.0"),
        ({"size": "tiny", "block_size": 512}, "block_size: got 512; allowed for hunyuan-video"),
        ({"computed_steps": 20}, "computed steps: got 20 from ''; allowed: both or neither"),
        ({"computed_steps": 60, "computed_steps_source": "x"}, "computed steps: got 60; allowed: 0 to 50"),
        (
            {"computed_steps": 20, "computed_steps_source": "x", "model": ("wan2.1-14b", "flux.1-dev")},
            "got 2 models",
        ),
        ({"computed_steps": 4, "computed_steps_source": "x", "model": ("wan2.1-14b",)}, "got 4; allowed: 5 to 50"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ModelSettings(**{"model": ("hunyuan-video",), **changes})


def test_what_cannot_run_is_an_error_where_asked_for(no_timing: None) -> None:
    with pytest.raises(BenchError, match=r"baseline fa4: .*allowed for wan2.1-14b here: \['sdpa'\]"):
        run("wan2.1-14b", baseline=("sdpa", "fa4"))
    with pytest.raises(BenchError, match=r"cannot run torch\.float32 on cpu"):
        run("wan2.1-14b", backend="fa4")
    with pytest.raises(BenchError, match="backend: got 'fast'"):
        run("wan2.1-14b", backend="fast")


def invoke(*arguments: str, columns: int = 300) -> Any:
    return CliRunner().invoke(app, ["bench", "model", *arguments], env={"COLUMNS": str(columns)})


def test_command_prints_markdown_tables_and_writes_files_that_can_be_read_back(tmp_path: Path) -> None:
    result = invoke(
        "wan2.1-14b", *OPTIONS, "--compiler", "aot_eager", "--sparsity", "0.75", "--full", "--steps", "20",
        "--computed-steps", "8", "--computed-steps-source", "a test", "--csv-dir", str(tmp_path / "new"), columns=60,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    forwards, origin = read_rows(tmp_path / "new" / "model-forward.csv", ForwardRow)
    runs, _ = read_rows(tmp_path / "new" / "model-schedule.csv", ScheduleRow)
    assert [(row.kind, row.how) for row in forwards] == [
        (kind, how) for kind in ("dense", "sparse", "removed") for how in ("eager", "compiled")
    ]
    assert {(row.rectify, row.order) for row in (*forwards, *runs)} == {("query+slope", "content")}
    assert "float32, query+slope, content, random weights" in result.output
    assert origin.command.startswith("rectified-spaattn")
    lines = result.output.splitlines()
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
        assert f"{row.speedup:.2f}x" in result.output
    assert "Scaled, round by round: t(1) + 5 * (t(3) - t(1)) / 2" in result.output
    assert "off by" in result.output
    measured = [(row.kind, row.how) for row in forwards if row.measured_s is not None and row.measured_s > row.low_s]
    assert measured == [("dense", "eager"), ("sparse", "compiled")]


@pytest.mark.parametrize("asked", [{}, {"preset": "wan2.1-t2v-paper"}], ids=["default", "paper"])
def test_layers_run_what_the_rows_say(asked: dict[str, str], monkeypatch: pytest.MonkeyPatch, not_timed: None) -> None:
    handles = []
    enable = weights.enable
    monkeypatch.setattr(bench, "enable", lambda *given: handles.append(enable(*given)) or handles[-1])
    result = run("wan2.1-14b", sparsity=(0.75,), **asked)
    wanted = SparseConfig.paper(block_size=64) if asked else SparseConfig(block_size=64)
    nominal = wanted.replace(sparsity=0.75, top_p=0.0, neighbours=False)
    for row in (*result.schedules, *(row for row in result.forwards if row.kind == "sparse")):
        assert SparseConfig.from_dict(json.loads(row.config)) == nominal
        assert (row.rectify, row.order) == (nominal.rectify, nominal.order)
    sparse = [config for handle in handles for config in handle.configs().values() if config.sparsity]
    assert set(sparse) == {nominal}


def test_published_rows_can_be_read() -> None:
    for name, kind in (("model-forward.csv", ForwardRow), ("model-schedule.csv", ScheduleRow)):
        rows, _ = read_rows(Path(__file__).parents[1] / "docs" / "data" / name, kind)
        assert {(row.rectify, row.order) for row in rows} == {("ipar+gapr", "gilbert")}


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["wan2.1-14b", "--device", "cpu"], 1, "--size tiny"),
        (["wan2.1-14b", *OPTIONS, "--baseline", "cudnn"], 1, "needs a CUDA GPU"),
        (["sora"], 2, "got 'sora'"),
        (["wan2.1-14b", "--computed-steps", "9"], 2, "both or neither"),
        ([], 2, "Missing argument"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], code: int, problem: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert problem in result.output


def test_help_names_the_models_and_options() -> None:
    printed = invoke("--help").output
    for part in (*MODELS, "--full", "--no-compile", "--computed-steps-source", "--csv-dir", "--preset"):
        assert part in printed
