"""`rectified-spaattn bench op` on a CPU: shapes, checks, timing, rows, files, the figure and the command."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.benchmark import op, shapes
from rectified_spaattn.benchmark.baselines import BASELINES
from rectified_spaattn.benchmark.check import BenchError
from rectified_spaattn.benchmark.op import Measured, OpSettings, measure, runnable
from rectified_spaattn.benchmark.panels import panels
from rectified_spaattn.benchmark.record import Machine, Row, StageRow, machine, read_csv, write_csv
from rectified_spaattn.benchmark.shapes import SHAPES
from rectified_spaattn.benchmark.timing import Timed
from rectified_spaattn.cli.app import app
from rectified_spaattn.report.figures import speed_figure

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TORCH = BACKENDS["torch"]
TINY = {"shapes": ("tiny",), "dtype": "float32", "block_size": 32, "repeats": 3, "device": "cpu"}
OPTIONS = ["--shape", "tiny", "--dtype", "float32", "--block-size", "32", "--repeats", "3", "--device", "cpu"]
ON_GPU = Machine(device="a GPU", torch="1", triton="2", flash_attn_4="", commit="c", command="x", created="now")


def settings(**changes: Any) -> OpSettings:
    return OpSettings(**{**TINY, **changes})


def run(**changes: Any) -> Measured:
    asked = settings(**changes)
    return measure(asked.cases()[0], asked, lambda what, done, total: None)


class Fake(NamedTuple):
    """A backend as the registry holds it, with the field that backends with stages have."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *_: None
    stages: Callable[..., dict[str, Callable[[], object]]] | None = None


def changed(change: Callable[..., Any]) -> Callable[..., Any]:
    """The torch backend with change(out, plan, layout, config) made to what it returns."""

    def altered(q: Any, k: Any, v: Any, layout: Any, config: Any, *rest: Any) -> Any:
        return change(*TORCH.run(q, k, v, layout, config, *rest), layout, config)

    return altered


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, in spite of all."""
    timed: list[str] = []

    def refuse(calls: dict[str, Timed], *_: Any) -> None:
        timed.extend(calls)
        raise AssertionError(f"timed {list(calls)}")

    monkeypatch.setattr(op, "interleaved", refuse)
    return timed


def test_rows_are_complete_and_consistent() -> None:
    sparsities = (0.5, 0.75)
    done = run(sparsities=sparsities, backends=("torch",))
    ran = [row for row in done.rows if not row.not_run]
    assert [(row.kind, row.name, row.sparsity) for row in ran] == [
        ("dense", "sdpa", None),
        ("sparse", "torch", 0.5),
        ("sparse", "torch", 0.75),
    ]
    for row in ran:
        assert all(
            getattr(row, name) is not None for name in Row.__annotations__ if name not in ("sparsity", "extra_bytes")
        )
        assert row.ms_min <= row.ms_q1 <= row.ms <= row.ms_q3 <= row.ms_max
        assert row.dense == "sdpa"
        assert row.dense_ms == ran[0].ms
        assert row.ratio == pytest.approx(ran[0].ms / row.ms)
        assert row.ideal == pytest.approx(1 / row.density)
        assert row.tflops == pytest.approx(4 * 266**2 * 2 * 64 * row.density / (row.ms / 1000) / 1e12)
        assert row.extra_bytes is None  # torch does not count a CPU's memory
        assert row.repeats == 3
        assert row.input_sets == 2
    blocks = 256 // 32
    for row, kept in zip(ran[1:], (4, 2), strict=True):
        assert row.density == pytest.approx((blocks * kept * 32**2 + 256 * 10 + 10 * 266) / 266**2)
    assert {row.name: bool(row.not_run) for row in done.rows if row.kind == "dense"} == {
        "sdpa": False,
        "cudnn": True,
        "flash2": True,
        "fa4": True,
    }
    checked = {each.what.split(" at ")[0] for each in done.checks}
    assert checked == {
        "dense attention",
        "sparsity 0 is dense attention",
        "80% sparse is the reference",
        "R",
        "sampled blocks",
        "isolated queries",
    }
    assert done.stages == []


@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("rectify", ["ipar+gapr", "row"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_checks(dtype: str, rectify: str, order: str) -> None:
    done = run(dtype=dtype, rectify=rectify, order=order, sparsities=(0.8,), block_size=64, backends=("torch",))
    assert {row.order for row in done.rows} == {order}
    assert all(each.error <= each.allowed for each in done.checks)


WRONG = {
    "noise": lambda out, plan, layout, config: (torch.randn_like(out), plan),
    "not finite": lambda out, plan, layout, config: (out * torch.nan, plan),
    "two per mille off": lambda out, plan, layout, config: (out * 1.002, plan),
    "no compensation": lambda out, plan, layout, config: (
        out,
        plan._replace(compensated=torch.zeros_like(plan.compensated)),
    ),
    "too many blocks": lambda out, plan, layout, config: (
        out,
        plan._replace(block_mask=torch.ones_like(plan.block_mask)),
    ),
    "other blocks": lambda out, plan, layout, config: (
        out,
        plan._replace(block_mask=plan.block_mask.roll(1, -1)),
    ),
    "wrong at full size only": lambda out, plan, layout, config: (
        out + (layout.grid == SHAPES["tiny"].grid) * 1e-3,
        plan,
    ),
    "isolated queries wrong at full size": lambda out, plan, layout, config: (
        out.index_fill(1, layout.isolated, 0.5) if layout.grid == SHAPES["tiny"].grid else out,
        plan,
    ),
    "R wrong": lambda out, plan, layout, config: (out, plan._replace(r=plan.r + 0.1)),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_a_wrong_backend_is_refused_before_anything_is_timed(
    change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, no_timing: list[str]
) -> None:
    monkeypatch.setattr(shapes, "_SMALL", 200)  # such that the small form of the tiny shape is smaller
    monkeypatch.setitem(BACKENDS, "fake", Fake(changed(change)))
    with pytest.raises(BenchError, match=r"fake.*got.*allowed.*[Nn]othing was timed"):
        run(sparsities=(0.8,))
    assert no_timing == []


def test_a_wrong_baseline_is_refused(monkeypatch: pytest.MonkeyPatch, no_timing: list[str]) -> None:
    monkeypatch.setitem(BASELINES, "sdpa", BASELINES["sdpa"]._replace(run=lambda q, k, v: v))
    with pytest.raises(BenchError, match="sdpa, dense attention"):
        run()


def test_what_cannot_run_is_an_error_where_asked_for_and_a_row_with_the_reason_where_not(
    monkeypatch: pytest.MonkeyPatch, no_timing: list[str]
) -> None:
    with pytest.raises(BenchError, match=r"baseline cudnn: needs a CUDA GPU.*allowed.*sdpa"):
        run(baselines=("cudnn",))
    monkeypatch.setitem(BACKENDS, "fake", Fake(TORCH.run, lambda *_: "not on Tuesdays"))
    with pytest.raises(BenchError, match="backend fake: not on Tuesdays"):
        run(backends=("fake",))
    assert runnable(settings().cases()[0])["fake"] == "not on Tuesdays"
    assert "reference" not in runnable(settings().cases()[0])
    assert no_timing == []
    monkeypatch.undo()
    monkeypatch.setitem(BACKENDS, "fake", Fake(TORCH.run, lambda *_: "not on Tuesdays"))
    done = run(sparsities=(0.8,))
    assert [row.not_run for row in done.rows if row.name == "fake"] == ["not on Tuesdays"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shapes": ("huge",)}, r"shape: got 'huge'; allowed: .*hunyuan-video"),
        ({"baselines": ("fa5",)}, "baseline: got 'fa5'"),
        ({"backends": ("reference",)}, "backend: got 'reference'"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"repeats": 1}, "repeats: got 1; allowed: 3 or more"),
        ({"sparsities": (1.0,)}, "sparsity: got 1.0"),
        ({"sparsities": (0.5, 0.5)}, "sparsity: got"),
        ({"block_size": 256}, "block_size: got 256; allowed for tiny"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**changes)


def test_stages_are_timed_where_a_backend_offers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stages(q: Any, k: Any, v: Any, layout: Any, config: Any, text_valid: Any, scale: float) -> dict[str, Any]:
        asked.append((q.shape, layout.sequence, config.sparsity, text_valid.tolist(), scale))
        return {"scores": lambda: q.sum(), "attend": lambda: [q @ k.transpose(-1, -2) for _ in range(20)]}

    monkeypatch.setitem(BACKENDS, "fake", Fake(TORCH.run, stages=stages))
    done = run(sparsities=(0.5, 0.75), backends=("fake",))
    assert asked == [((1, 266, 2, 64), 266, sparsity, [[True] * 10], 0.125) for sparsity in (0.5, 0.75)]
    assert [(row.backend, row.sparsity, row.stage) for row in done.stages] == [
        ("fake", sparsity, stage) for sparsity in (0.5, 0.75) for stage in ("scores", "attend")
    ]
    for sparsity in (0.5, 0.75):
        rows = [row for row in done.stages if row.sparsity == sparsity]
        assert math.fsum(row.share for row in rows) == pytest.approx(1)
        assert rows[1].share > rows[0].share
        whole = next(row.ms for row in done.rows if row.name == "fake" and row.sparsity == sparsity)
        assert {row.whole_ms for row in rows} == {whole}


def gpu_rows() -> list[Row]:
    """As if measured on a GPU: two shapes, two backends, three baselines, one of which is not there."""
    rows = []
    for name, factor in (("hunyuan-video", 1.0), ("wan-14b", 0.5)):
        shape = SHAPES[name]
        common: dict[str, Any] = {"shape": name, "tokens": shape.tokens, "heads": 24, "head_dim": 128}
        common |= {"block_size": 128, "rectify": "ipar+gapr", "order": "gilbert", "dtype": "bfloat16"}

        def row(kind: str, label: str, sparsity: float | None, ms: float, common: Any = common) -> Row:
            share = 1.0 if sparsity is None else 1.01 - sparsity
            times = {"ms": ms, "ms_q1": 0.97 * ms, "ms_q3": 1.04 * ms, "ms_min": 0.9 * ms, "ms_max": 1.2 * ms}
            dense = 270.0 * factor  # noqa: B023  # called in the same turn
            more = {"repeats": 10, "input_sets": 3, "dense": "cudnn", "dense_ms": dense, "ratio": dense / ms}
            sizes = {"density": share, "ideal": 1 / share, "tflops": 500.0, "extra_bytes": 3 << 30}
            return Row(**common, kind=kind, name=label, sparsity=sparsity, **times, **more, **sizes)

        rows += [row("dense", "cudnn", None, 270 * factor), row("dense", "flash2", None, 470 * factor)]
        rows.append(Row(**common, kind="dense", name="fa4", not_run="flash-attn-4 is not installed"))
        for sparsity in (0.5, 0.7, 0.8, 0.8895, 0.95):
            density = 1.01 - sparsity
            rows.append(row("sparse", "triton", sparsity, factor * (15 + 300 * density)))
            rows.append(row("sparse", "torch", sparsity, factor * (200 + 900 * density)))
    return rows


def test_csv_round_trip_gives_the_same_rows_and_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, gpu_rows(), ON_GPU)
    rows, made_on = read_csv(path, Row)
    assert rows == gpu_rows()
    assert made_on == ON_GPU
    drawn = panels(rows)
    assert [(panel.shape, list(panel.lines), list(panel.levels)) for panel in drawn] == [
        (name, ["triton", "torch"], ["cudnn", "flash2"]) for name in ("hunyuan-video", "wan-14b")
    ]
    first = drawn[0].lines["triton"][2]
    assert first.speedup == pytest.approx(270 / (15 + 300 * 0.21))
    assert first.low == pytest.approx(first.speedup / 1.04)
    assert first.high == pytest.approx(first.speedup / 0.97)
    assert "triton is\n8.2 times as fast as dense cudnn (ideal: 16.7 times)" in drawn[0].title()
    speed_figure(tmp_path / "speed.png", drawn, "a GPU")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

    stage = StageRow(
        shape="tiny", backend="triton", rectify="row", order="content", sparsity=0.8, stage="attend", ms=1.0, ms_q1=0.9,
        ms_q3=1.1, ms_min=0.8, ms_max=1.2, repeats=10, share=1.0, whole_ms=1.1,
    )  # fmt: skip
    write_csv(path, [stage], ON_GPU)
    assert read_csv(path, StageRow)[0] == [stage]
    with pytest.raises(ValueError, match="got no column tokens"):
        read_csv(path, Row)
    with pytest.raises(ValueError, match="no measured backend"):
        panels([row for row in gpu_rows() if row.kind == "dense"])


def test_the_machine_is_recorded() -> None:
    made_on = machine(CPU, "rectified-spaattn bench op")
    assert made_on.torch == torch.__version__
    assert made_on.device
    assert made_on.commit == "" or len(made_on.commit.removesuffix("-dirty")) == 40


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "op", *arguments], env={"COLUMNS": "300"})


def test_command_prints_unsqueezed_tables_and_writes_files_that_can_be_redrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"attend": lambda: torch.ones(9).sum()}
    monkeypatch.setitem(BACKENDS, "fake", Fake(TORCH.run, stages=lambda *_: stages))
    arguments = [*OPTIONS, "--sparsity", "0.5", "--sparsity", "0.75", "--csv-dir", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "op", *arguments], env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"op-speed.csv", "op-stages.csv", "op-speed.png"}
    rows, made_on = read_csv(tmp_path / "op-speed.csv", Row)
    assert [row.name for row in rows if row.kind == "sparse" and not row.not_run] == ["torch", "torch", "fake", "fake"]
    assert len(read_csv(tmp_path / "op-stages.csv", StageRow)[0]) == 2
    assert made_on.command.startswith("rectified-spaattn")
    lines = result.output.splitlines()
    for row in rows:
        if row.not_run:
            assert f"not run: {row.kind} {row.name}: {row.not_run}" in lines
        else:
            shown = [line for line in lines if line.startswith(f"| {'dense ' * (row.kind == 'dense')}{row.name} ")]
            assert any(f" {row.ms:.3f} " in line and line.endswith(f" {row.ratio:.2f}x |") for line in shown)
    assert any("results checked before timing" in line for line in lines)
    assert sum("stages of fake, ipar+gapr, gilbert, at" in line for line in lines) == 2
    assert "speed-up over sdpa" in result.output

    again = invoke("--plot-from", str(tmp_path / "op-speed.csv"), "--plot", str(tmp_path / "again.png"))
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").stat().st_size == (tmp_path / "op-speed.png").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([*OPTIONS, "--baseline", "fa4"], 1, "baseline fa4: "),
        (["--shape", "tiny", "--device", "cpu", "--dtype", "int8"], 2, "dtype: got 'int8'"),
        (["--shape", "tiny", "--all-shapes"], 2, "one of the two"),
        (["--device", "cpu"], 1, "--shape tiny"),
        (["--plot-from", "missing.csv"], 2, "no such file"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], code: int, told: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert told in result.output


def test_help_names_the_commands() -> None:
    assert "op" in CliRunner().invoke(app, ["bench", "--help"]).output
    printed = CliRunner().invoke(app, ["bench", "op", "--help"], env={"COLUMNS": "200"}).output
    assert "default: (hunyuan-video)" in printed
    for option in ("--shape", "--all-shapes", "--sparsity", "--baseline", "--backend", "--csv-dir", "--plot-from"):
        assert option in printed
