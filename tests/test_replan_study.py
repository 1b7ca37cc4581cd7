"""The study of plans that live for several steps: errors of old plans, and the lines of its figure."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_calls import smooth_call
from rectified_spaattn import SparseConfig
from studies import replan

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SparseConfig(block_size=16, sparsity=0.8, top_p=0.0)
CONFIGS = [CONFIG, CONFIG.replace(replan=4), CONFIG.replace(replan=4, kept_lists=True)]


def test_old_plans_cost_nothing_on_calls_that_stay_and_something_on_calls_that_do_not() -> None:
    call = smooth_call()
    same = [replace(call, step=step) for step in range(4)]
    # in the order of the steps, whatever they came in
    planned, *kept = replan.errors(same[::-1], CONFIGS, 4, "auto", torch.float32)
    assert kept == [planned, planned]
    turned = [replace(call, step=step, **{x: getattr(call, x).roll(5 * step, 1) for x in "qkv"}) for step in range(4)]
    planned, *kept = replan.errors(turned, CONFIGS, 4, "auto", torch.float32)
    assert planned < kept[0] < kept[1]


def test_times_are_of_planning_and_of_taking() -> None:
    options = replan.Options(sparsity=(0.8,), repeats=2, device="cpu")
    got = replan.times(options, torch.device("cpu"))
    assert set(got) == {(0.8, "orders"), (0.8, "orders and lists")}
    assert all(len(ms) == 2 and min(ms) > 0 for ms in got.values())


def row(kept: str, steps: int, ms: float, psnr: float) -> replan.Row:
    figures = {"error": 0.1, "ssim": 0.9, "density": 0.1, "bytes": 8, "shape": "tiny"}
    return replan.Row(prompt="a", seed=0, sparsity=0.9, kept=kept, replan=steps, ms=ms, psnr=psnr, **figures)


def test_every_line_begins_with_planning_in_every_call(tmp_path: Path) -> None:
    rows = [row("orders", 1, 9, 30), row("orders", 4, 8, 29), row("orders and lists", 2, 6, 28)]
    lines = replan.points(rows)
    assert {key: [(steps, ms) for steps, ms, _ in line] for key, line in lines.items()} == {
        (0.9, "orders"): [(1, 9), (4, 8)],
        (0.9, "orders and lists"): [(1, 9), (2, 6)],
    }
    replan.plot(rows, tmp_path / "replan.png")
    assert (tmp_path / "replan.png").read_bytes().startswith(b"\x89PNG")
