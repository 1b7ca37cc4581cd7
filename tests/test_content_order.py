"""The study of ways to sort: "content" is the operator's own, and moving tokens alone changes no output."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attention_calls import smooth_call
from rectified_spaattn import SparseConfig, rectified_attention
from rectified_spaattn.evaluation.attention_error import attention_error, full_attention
from rectified_spaattn.evaluation.capture import AttentionCall
from rectified_spaattn.method import arrange

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import content_order
from content_order import IN_USE, WAYS, apart, by_content, hilbert_index, judge

SCRIPT = content_order.__file__

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SparseConfig(block_size=16, sparsity=0.9, rectify="row", neighbours=False, top_p=0.0)


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return smooth_call(grid=(8, 8, 16))  # 64 blocks of 16


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_moves_every_token_once_and_with_all_blocks_kept_is_dense_attention(
    name: str, call: AttentionCall
) -> None:
    layout = call.layout(16)
    orders = WAYS[name].sort(call, layout)
    for order in orders:
        assert torch.equal(order.sort(-1).values, layout.tiled.sort().values.expand_as(order))
    [(captured, error)] = judge(call, full_attention(call), layout, orders, [CONFIG.replace(sparsity=0.0)])
    assert captured == pytest.approx(1)
    assert error < 1e-5


def test_queries_and_keys_have_orders_of_their_own(call: AttentionCall) -> None:
    order_q, order_k = apart(call, call.layout(16))
    assert not torch.equal(order_q, order_k)


def test_content_is_what_the_operator_does(call: AttentionCall) -> None:
    layout = call.layout(16)
    orders = by_content(call, layout)
    config = CONFIG.replace(order="content")
    whole = attention_error(call, config)
    assert torch.equal(whole.stats.token_order, orders[0])
    [(_, error)] = judge(call, full_attention(call), layout, orders, [CONFIG])
    assert error == pytest.approx(whole.relative_error, rel=1e-4)


def test_other_constants_are_in_force_for_one_order_alone(call: AttentionCall) -> None:
    layout, before = call.layout(16), arrange.DIRECTIONS
    some, _ = by_content(call, layout, DIRECTIONS=2)
    assert before == arrange.DIRECTIONS
    config = CONFIG.replace(order="content")
    given = call.layout(16, "content")
    _, stats = rectified_attention(call.q, call.k, call.v, given, config, text_mask=call.text_mask, return_stats=True)
    assert not torch.equal(some, stats.token_order)


def test_the_hilbert_curve_goes_from_cell_to_neighbour() -> None:
    side = torch.arange(8)
    cells = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), dim=-1).view(-1, 3)
    places = hilbert_index(cells, bits=3)
    assert torch.equal(places.sort().values, torch.arange(512))
    assert (cells[places.argsort()].diff(dim=0).abs().sum(1) == 1).all()


def test_the_script_compares_every_way_with_content(tmp_path: Path) -> None:
    options = ["--prompts", "1", "--size", "32", "--block-size", "16", "--block-size", "32", "--step", "1"]
    options += ["--only", "in space", "--only", "4 x 4 x 4 slices", "--out", str(tmp_path)]
    ran = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    with (tmp_path / "content-order.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = ["in space", IN_USE, "4 x 4 x 4 slices"]
    assert [(row["block_size"], row["way"]) for row in rows] == [("16", way) for way in ways] + [
        ("32", way) for way in ways[:2]
    ]
    assert float(rows[1]["error"]) < float(rows[0]["error"])
    assert "Not measured at block size 32: " in ran.stdout
    again = subprocess.run(
        [sys.executable, SCRIPT, "--table-of", str(tmp_path / "content-order.csv")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert again.returncode == 0, again.stderr
    tables = [[line for line in x.stdout.splitlines() if line.startswith("|")] for x in (ran, again)]
    assert len(tables[0]) == 2 + 5
    assert tables[0] == tables[1]
    refused = subprocess.run([sys.executable, SCRIPT, "--only", "by name"], capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2
