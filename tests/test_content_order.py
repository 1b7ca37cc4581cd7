"""The study of ways to sort: "content" is the operator's own, and moving tokens alone changes no output."""

from pathlib import Path

import pytest
import torch

from attention_calls import smooth_call
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import attention_error, full_attention
from rectified_spaattn.method import arrange
from studies.content_order import (
    IN_USE,
    WAYS,
    Options,
    Row,
    apart,
    by_content,
    content_order_study,
    hilbert_index,
    judge,
)
from studies.harness import EXACT
from studies.rows import read_rows
from study_runs import run_study, table_lines

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = EXACT.replace(block_size=16, sparsity=0.9, rectify="row")


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return smooth_call(grid=(8, 8, 16))  # 64 blocks of 16


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_moves_every_token_once_and_with_all_blocks_kept_is_dense_attention(
    name: str, call: AttentionCall
) -> None:
    blocks = call.blocks(CONFIG)
    orders = WAYS[name].sort(call, blocks)
    for order in orders:
        assert torch.equal(order.sort(-1).values, blocks.tiled.sort().values.expand_as(order))
    [measured] = judge(call, full_attention(call), orders, [CONFIG.replace(sparsity=0.0)])
    assert measured["captured"] == pytest.approx(1)
    assert measured["error"] < 1e-5


def test_queries_and_keys_have_orders_of_their_own(call: AttentionCall) -> None:
    order_q, order_k = apart(call, call.blocks(CONFIG))
    assert not torch.equal(order_q, order_k)


def test_content_is_what_the_operator_does(call: AttentionCall) -> None:
    blocks = call.blocks(CONFIG)
    orders = by_content(call, blocks)
    config = CONFIG.replace(order="content")
    whole = attention_error(call, config)
    assert torch.equal(whole.stats.token_order, orders[0])
    [measured] = judge(call, full_attention(call), orders, [CONFIG])
    assert measured["error"] == pytest.approx(whole.relative_error, rel=1e-4)


def test_other_constants_are_in_force_for_one_order_alone(call: AttentionCall) -> None:
    blocks, before = call.blocks(CONFIG), arrange.DIRECTIONS
    some, _ = by_content(call, blocks, DIRECTIONS=2)
    assert before == arrange.DIRECTIONS
    config = CONFIG.replace(order="content")
    _, stats = call.sparse(config)
    assert not torch.equal(some, stats.token_order)


def test_the_hilbert_curve_goes_from_cell_to_neighbour() -> None:
    side = torch.arange(8)
    cells = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), dim=-1).view(-1, 3)
    places = hilbert_index(cells, bits=3)
    assert torch.equal(places.sort().values, torch.arange(512))
    assert (cells[places.argsort()].diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.slow
def test_the_study_compares_every_way_with_content(tmp_path: Path) -> None:
    options = [
        "--pairs",
        "1",
        "--size",
        "32",
        "--block-size",
        "16",
        "--block-size",
        "32",
        "--step",
        "1",
        "--steps",
        "4",
    ]
    options += ["--only", "in space", "--only", "4 x 4 x 4 slices", "--device", "cpu", "--out", str(tmp_path)]
    printed = run_study(Options, content_order_study, *options)
    rows, _ = read_rows(tmp_path / "content_order-dev.csv", Row)
    ways = ["in space", IN_USE, "4 x 4 x 4 slices"]
    assert [(row.block_size, row.way) for row in rows] == [(16, way) for way in ways] + [(32, way) for way in ways[:2]]
    assert rows[1].error < rows[0].error
    assert "Not measured at block size 32: " in printed
    again = run_study(Options, content_order_study, "--table-of", str(tmp_path / "content_order-dev.csv"))
    assert len(table_lines(printed)) == 2 + 5
    assert table_lines(again) == table_lines(printed)
    run_study(Options, content_order_study, "--only", "by name", code=2)
