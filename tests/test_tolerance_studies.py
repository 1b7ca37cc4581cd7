"""Studies of a tolerance: reading off between sparsities, repairs by probe rows, the controller on captured calls."""

import math
from dataclasses import replace

import pytest
import torch

from attention_calls import smooth_call
from rectified_spaattn.lab.calls.capture import AttentionCall
from studies import controller, repair, tolerance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return smooth_call()


def row(kind: str, value: float, density: float, psnr: float, prompt: str = "a") -> tolerance.Row:
    figures = {"error": 0.1, "error_p99": 0.2, "unheld": 0.0, "ssim": psnr / 100}
    return tolerance.Row(
        prompt=prompt, seed=0, mode="row", kind=kind, value=value, density=density, psnr=psnr, **figures
    )


def test_what_stands_between_two_points() -> None:
    line = [(2.0, 30.0), (1.0, 20.0), (4.0, 10.0)]
    assert [tolerance.read_off(line, x) for x in (1.0, 1.5, 2.0, 3.0, 4.0)] == [20, 25, 30, 20, 10]
    assert tolerance.read_off(line, 0.99) is tolerance.read_off(line, 4.01) is tolerance.read_off([], 1.0) is None
    assert tolerance.read_off([(1.0, 5.0)], 1.0) == 5


def test_a_tolerance_is_compared_at_its_own_pairs() -> None:
    rows = [row("sparsity", 0.9, 0.1, 20.0), row("sparsity", 0.6, 0.4, 30.0), row("tolerance", 0.05, 0.2, 26.0)]
    line = tolerance.against_uniform(rows).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["row", "0.05"]
    assert cells[3].startswith("+1.000")  # 25 in the middle of the logarithms
    needed = 0.1 * math.exp(0.6 * math.log(4))
    assert cells[5].startswith(f"{100 * (0.2 / needed - 1):+.3f}")
    assert cells[6] == "1"
    assert tolerance.against_uniform([*rows[:2], row("tolerance", 0.2, 0.05, 9.0)]).splitlines()[-1].endswith("| 0 |")


def test_probe_rows_repair_what_is_linear_and_leave_what_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    out, q, noise = (torch.randn(500, 6, generator=generator) for _ in range(3))
    probed = torch.arange(0, 500, 12)
    full = out @ torch.randn(6, 6, generator=generator) + 1
    chosen, best = repair.repaired("a matrix times the output", out, full, q, probed)
    assert best <= chosen < 1e-2 * (full - out).square().sum()
    assert repair.repaired("one factor", out, 2 * out, q, probed)[0] == pytest.approx(0, abs=1e-6)
    chosen, _ = repair.repaired("both", out, out + noise, q, probed)  # nothing to be learnt: no correction is best
    assert chosen < 1.1 * noise.square().sum()


def test_repairs_of_a_call(call: AttentionCall) -> None:
    options = repair.Options(block_size=16, rows=16, kept=(3,), mode=("none", "query+slope"))
    got = {(each["mode"], each["repair"]): each for each in repair.measured([call], options)}
    assert len(got) == 2 * len(repair.REPAIRS)
    for mode in options.mode:
        assert got[mode, repair.BLOCK_MORE]["error"] < got[mode, "none"]["error"]
        assert all(each["best"] <= each["error"] + 1e-9 for each in got.values())
    assert got["query+slope", "none"]["error"] < got["none", "none"]["error"]


def test_the_controller_on_calls_that_do_not_change(call: AttentionCall) -> None:
    calls = [replace(call, step=step) for step in range(12)]
    kept, start = (1, 2, 4, 8), (1.0, 8.0)
    options = controller.Options(
        block_size=16, rows=240, kept=kept, mode=("query+slope",), tolerance=(0.05,), gain=(0.5,), start=start
    )
    few, many = controller.measured(calls, options)
    for each in (few, many):
        assert 0.7 < each["median"] < 1.1  # with nearly all rows probed it settles at the tolerance
        assert each["deviation"] < 0.1
        assert 1 < each["kept"] < 8
    assert few["kept"] < 1.5 * many["kept"]
