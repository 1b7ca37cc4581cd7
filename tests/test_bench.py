"""`rectified-spaattn bench op` on a CPU: checks, timing, rows, files and the command."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn import SparseConfig, rectified_attention
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.backends.calls import Backend
from rectified_spaattn.cli.app import app
from rectified_spaattn.lab.bench import op, shapes
from rectified_spaattn.lab.bench.baselines import BASELINES
from rectified_spaattn.lab.bench.op import OpResult, OpSettings, measure
from rectified_spaattn.lab.bench.rows import Row, StageRow
from rectified_spaattn.lab.bench.shapes import SHAPES, BenchError, Case
from rectified_spaattn.lab.bench.stages import stages_of
from rectified_spaattn.lab.bench.timing import Timed
from studies.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TORCH = BACKENDS["torch"]
TINY = {"shape": ("tiny",), "dtype": "float32", "block_size": 32, "repeats": 2, "device": "cpu"}
PAPER = {"rectify": "ipar+gapr", "order": "gilbert"}
OPTIONS = ["--shape", "tiny", "--dtype", "float32", "--block-size", "32", "--repeats", "2", "--device", "cpu"]
DATA = Path(__file__).parents[1] / "docs" / "data"


def settings(**changes: Any) -> OpSettings:
    return OpSettings(**{**TINY, **changes})


def run(**changes: Any) -> OpResult:
    asked = settings(**changes)
    return measure(asked.cases()[0], asked, lambda what, finished, total: None)


def changed(change: Callable[..., Any]) -> Backend:
    """The torch backend with change(out, choices, order, blocks) made to what it attended, chose and sorted."""

    def sort(inputs: Any) -> torch.Tensor:
        return change(None, None, TORCH.sort(inputs), inputs.blocks)[2]

    def plan(inputs: Any) -> Any:
        choices, prepared = TORCH.plan(inputs)
        return change(None, choices, None, inputs.blocks)[1], prepared

    def attend(inputs: Any, prepared: Any) -> torch.Tensor:
        return change(TORCH.attend(inputs, prepared), None, None, inputs.blocks)[0]

    return TORCH._replace(sort=sort, plan=plan, attend=attend)


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, in spite of all."""
    timed: list[str] = []

    def refuse(calls: dict[Any, Timed], *_: Any) -> None:
        timed.extend(map(str, calls))
        raise AssertionError(f"timed {list(calls)}")

    monkeypatch.setattr(op, "durations", refuse)
    return timed


def test_rows_are_complete_and_consistent() -> None:
    result = run(sparsity=(0.75, 0.5), backend=("torch",))
    measured = [row for row in result.rows if not row.not_run]
    assert [(row.kind, row.name, row.sparsity) for row in measured] == [
        ("dense", "sdpa", None),
        ("sparse", "torch", 0.5),
        ("sparse", "torch", 0.75),
    ]
    for row in measured:
        assert all(
            getattr(row, name) is not None
            for name in Row.__dataclass_fields__
            if name not in ("sparsity", "extra_bytes", "error")
        )
        assert row.ms_min <= row.ms_q1 <= row.ms <= row.ms_q3 <= row.ms_max
        assert (row.dense, row.dense_ms) == ("sdpa", measured[0].ms)
        assert row.ratio == pytest.approx(measured[0].ms / row.ms)
        assert row.ideal == pytest.approx(1 / row.density)
        assert row.tflops == pytest.approx(4 * 266**2 * 2 * 64 * row.density / (row.ms / 1000) / 1e12)
        assert row.extra_bytes is None  # torch does not count a CPU's memory
        assert (row.repeats, row.input_sets) == (2, 2)
    assert measured[0].error is None
    assert 0 < measured[1].error < measured[2].error < 0.2
    blocks = 256 // 32
    for row, kept in zip(measured[1:], (4, 2), strict=True):
        pooled = 256 * (blocks - kept)  # one key a dropped block and query
        assert row.density == pytest.approx((blocks * kept * 32**2 + pooled + 256 * 10 + 10 * 266) / 266**2)
        ran = SparseConfig(sparsity=row.sparsity, block_size=32, top_p=0.0)  # the package's defaults but for top_p
        assert SparseConfig.from_dict(json.loads(row.config)) == ran
        assert (row.rectify, row.order) == (ran.rectify, ran.order)
    assert {row.name: bool(row.not_run) for row in result.rows if row.kind == "dense"} == {
        "sdpa": False,
        "cudnn": True,
        "flash2": True,
        "fa4": True,
    }
    assert {each.what for each in result.checks} == {
        "dense attention",
        "sparsity 0 is dense attention",
        "0.8 sparse is the reference",
        "R",
        "sampled blocks",
        "isolated queries",
    }
    for sparsity in (0.5, 0.75):
        stages = [row for row in result.stages if row.sparsity == sparsity]
        assert [row.stage for row in stages] == ["order by content", "plan", "attend"]
        assert math.fsum(row.share for row in stages) == pytest.approx(1)
        whole = next(row.ms for row in measured if row.sparsity == sparsity)
        assert {row.whole_ms for row in stages} == {whole}


@pytest.mark.parametrize(("rectify", "order"), [("query+slope", "content"), ("ipar+gapr", "gilbert")])
def test_heads_that_share_keys_pass_the_checks(rectify: str, order: str) -> None:
    result = run(sparsity=(0.5,), backend=("torch",), kv_heads=1, rectify=rectify, order=order)
    assert {row.shape for row in result.rows} == {"tiny with 1 heads of keys"}
    assert "isolated queries" in {each.what for each in result.checks}


def test_heads_of_keys_that_do_not_divide_those_of_queries() -> None:
    with pytest.raises(ValueError, match="kv_heads: got 3; allowed for tiny: what divides its 2 heads"):
        run(kv_heads=3)


@pytest.mark.parametrize(
    ("dtype", "rectify", "order"),
    [
        *(("bfloat16", "row", "content"), ("float16", "row", "gilbert"), ("bfloat16", "ipar+gapr", "gilbert")),
        ("bfloat16", "query+slope", "content"),
    ],
)
def test_half_precision_passes_the_checks(dtype: str, rectify: str, order: str) -> None:
    result = run(dtype=dtype, rectify=rectify, order=order, sparsity=(0.8,), block_size=64, backend=("torch",))
    assert {(row.rectify, row.order) for row in result.rows} == {(rectify, order)}
    assert all(each.error <= each.allowed for each in result.checks)


def test_a_preset_is_what_runs_without_its_schedule_and_with_the_nominal_share_of_blocks() -> None:
    config = settings(preset="wan2.1-t2v-paper", block_size=None).config()
    assert config == SparseConfig.paper(sparsity=0.75, top_p=0.0, neighbours=False)
    assert settings(preset="wan2.1-t2v-paper", order="content").config().order == "content"


def off(**changes: Callable[..., Any]) -> Callable[..., Any]:
    """A change to some of out, choices and order, each given as fault(value, blocks)."""

    def change(out: Any, choices: Any, order: Any, blocks: Any) -> tuple[Any, Any, Any]:
        values = {"out": out, "choices": choices, "order": order}
        faults = {name: fault(values[name], blocks) for name, fault in changes.items() if values[name] is not None}
        return tuple((values | faults).values())  # type: ignore[return-value]

    return change


def at_full_size(blocks: Any) -> bool:
    return bool(blocks.sequence == SHAPES["tiny"].tokens)


WRONG = {
    "noise": off(out=lambda out, _: torch.randn_like(out)),
    "not finite": off(out=lambda out, _: out * torch.nan),
    "two per mille off": off(out=lambda out, _: out * 1.002),
    "no compensation": off(choices=lambda c, _: c._replace(compensated=torch.zeros_like(c.compensated))),
    "too many blocks": off(choices=lambda c, _: c._replace(block_mask=torch.ones_like(c.block_mask))),
    "other blocks": off(choices=lambda c, _: c._replace(block_mask=c.block_mask.roll(1, -1))),
    "R wrong": off(choices=lambda c, _: c._replace(r=c.r + 0.1)),
    "wrong at full size only": off(out=lambda out, blocks: out + at_full_size(blocks) * 1e-3),
    "isolated queries wrong at full size": off(
        out=lambda out, blocks: out.index_fill(1, blocks.isolated, 0.5) if at_full_size(blocks) else out
    ),
    "a token twice": off(order=lambda order, _: order.index_copy(-1, torch.tensor([0]), order[..., 1:2])),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_a_wrong_backend_is_refused_before_anything_is_timed(
    change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, no_timing: list[str]
) -> None:
    monkeypatch.setattr(shapes, "_SMALL", 200)  # such that the small form of the tiny shape is smaller
    monkeypatch.setitem(BACKENDS, "torch", changed(change))
    asked = {} if change is WRONG["a token twice"] else PAPER
    with pytest.raises(BenchError, match=r"torch.*got.*[Nn]othing was timed"):
        run(sparsity=(0.8,), backend=("torch",), **asked)
    assert no_timing == []


def test_a_wrong_baseline_is_refused(monkeypatch: pytest.MonkeyPatch, no_timing: list[str]) -> None:
    monkeypatch.setitem(BASELINES, "sdpa", BASELINES["sdpa"]._replace(run=lambda q, k, v: v))
    with pytest.raises(BenchError, match="sdpa, dense attention"):
        run()


def test_what_cannot_run_is_an_error_where_asked_for_and_a_row_with_the_reason_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BenchError, match=r"baseline cudnn: needs a CUDA GPU.*allowed for tiny here: \['sdpa'\]"):
        run(baseline=("cudnn",))
    monkeypatch.setitem(BACKENDS, "triton", TORCH._replace(why_not=lambda _: "not on Tuesdays"))
    with pytest.raises(BenchError, match="backend triton: not on Tuesdays"):
        run(backend=("triton",))
    result = run(sparsity=(0.8,))
    assert [row.not_run for row in result.rows if row.name == "triton"] == ["not on Tuesdays"]
    assert not any(row.name == "reference" for row in result.rows)


def test_precisions_run_where_they_can_and_are_checked_against_that_of_the_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BenchError, match="precision fp8: torch: precision 'fp8', which triton runs; allowed"):
        run(precision=("inputs", "fp8"), backend=("torch",))
    for factor, fits in ((1.1, True), (1.2, False)):  # weights and values are off by a sixteenth at most

        def attend(inputs: Any, prepared: Any, factor: float = factor) -> torch.Tensor:
            return TORCH.attend(inputs, prepared) * (factor if inputs.config.precision == "fp8" else 1.0)

        monkeypatch.setitem(BACKENDS, "triton", TORCH._replace(why_not=lambda _: None, attend=attend))
        asked = {"precision": ("inputs", "fp8"), "backend": ("torch", "triton"), "sparsity": (0.5,)}
        if not fits:
            with pytest.raises(BenchError, match=r"sparse triton, fp8 0.5, that in the inputs' precision"):
                run(**asked)
            return
        rows = [row for row in run(**asked).rows if row.kind == "sparse"]
        assert [row.label for row in rows] == ["torch", "triton", "triton, fp8", "torch, fp8"]
        assert [json.loads(row.config)["precision"] for row in rows] == ["inputs", "inputs", "fp8", "fp8"]
        assert [bool(row.not_run) for row in rows] == [False, False, False, True]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": ("huge",)}, r"shape: got 'huge'; allowed: .*hunyuan-video"),
        ({"baseline": ("fa5",)}, "baseline: got 'fa5'"),
        ({"backend": ("reference",)}, "backend: got 'reference'"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"repeats": 1}, "repeats: got 1; allowed: 2 or more"),
        ({"sparsity": (1.0,)}, "sparsity: got 1.0"),
        ({"sparsity": (0.5, 0.5)}, "sparsity: got"),
        ({"block_size": 256}, "block_size: got 256; allowed for tiny"),
        ({"rectify": "mean"}, "rectify: got 'mean'"),
        ({"preset": "sora"}, "preset: got 'sora'"),
        ({"all_shapes": True}, "one of the two"),
        ({"precision": ("auto",)}, "precision: got 'auto'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings(**changes)


@pytest.mark.parametrize(
    "config",
    [
        SparseConfig(block_size=64),
        SparseConfig.paper(block_size=64),
    ],
    ids=["default", "paper"],
)
def test_stages_of_kernels_can_be_run_again_and_again(config: SparseConfig) -> None:
    case = Case(replace(SHAPES["tiny"], grid=(2, 8, 8), heads=1), config, torch.float32, CPU)
    if BACKENDS["triton"].why_not(case.call()) is not None:
        pytest.skip("triton runs on the GPU here")
    qkv = case.inputs(0)[0]
    stages = stages_of("triton", case, qkv)
    expected = ["tile + pool", "scores, gain", "select, lists, R"]
    expected = ["order by content", *expected] if config.by_content else [*expected, "C"]
    expected += ["slope"] * config.rule.slope
    assert list(stages) == [*expected, "attend, rectify, un-reorder"]
    for stage in stages.values():
        out = stage()
    assert torch.equal(out, rectified_attention(*qkv, case.layout(), config, backend="triton"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["op-speed", "op-speed-modes", "op-stages-modes"])
def test_published_rows_can_be_read(name: str) -> None:
    rows, origin = read_rows(DATA / f"{name}.csv", StageRow if "stages" in name else Row)
    assert rows[0].shape == "hunyuan-video"
    assert origin.device == "NVIDIA H200"


def invoke(*arguments: str, columns: int = 300) -> Any:
    return CliRunner().invoke(app, ["bench", "op", *arguments], env={"COLUMNS": str(columns)})


def test_command_prints_unsqueezed_tables_and_writes_files_that_can_be_read_back(tmp_path: Path) -> None:
    more = ["--backend", "torch", "--sparsity", "0.75", "--sparsity", "0.5", "--csv-dir", str(tmp_path / "new")]
    result = invoke(*OPTIONS, *more, columns=40)
    assert result.exit_code == 0, result.output
    rows, origin = read_rows(tmp_path / "new" / "op-speed.csv", Row)
    assert {row.sparsity for row in rows if not row.not_run} == {None, 0.5, 0.75}
    assert len(read_rows(tmp_path / "new" / "op-stages.csv", StageRow)[0]) == 6
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"op-speed.csv", "op-stages.csv"}
    assert origin.command.startswith("rectified-spaattn")
    lines = result.output.splitlines()
    for row in rows:
        if row.not_run:
            assert f"not run: {row.kind} {row.name}: {row.not_run}" in lines
        else:
            shown = [line for line in lines if line.startswith(f"| {'dense ' * (row.kind == 'dense')}{row.name} ")]
            assert any(f" {row.ms:.3f} " in line and line.endswith(f" {row.ratio:.2f}x |") for line in shown)
    assert any("results checked before timing" in line for line in lines)
    assert sum("stages of torch, query+slope, content, at" in line for line in lines) == 2
    assert "speed-up over sdpa" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([*OPTIONS, "--baseline", "fa4"], 1, "baseline fa4: "),
        (["--shape", "tiny", "--device", "cpu", "--dtype", "int8"], 2, "dtype: got 'int8'"),
        (["--shape", "tiny", "--all-shapes"], 2, "one of the two"),
        (["--device", "cpu"], 1, "--shape tiny"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], code: int, problem: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert problem in result.output


def test_help_names_the_options() -> None:
    printed = " ".join(invoke("--help").output.split())
    assert "default: (hunyuan-video)" in printed
    for option in ("--shape", "--all-shapes", "--sparsity", "--baseline", "--backend", "--preset", "--csv-dir"):
        assert option in printed
