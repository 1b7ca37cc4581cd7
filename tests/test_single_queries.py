"""The study of single queries: its rule token by token, its kernels against it, its tail against the operator's."""

import math

import pytest
import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.method import arrange
from rectified_spaattn.method.pool import pool
from studies import ingredients, single_queries, single_query_kernels
from studies.rivals import groups
from studies.rivals.contract import relative_error
from studies.single_query_rule import exchanged, sampled_rows, unsettled
from tensors import video_like
from test_rivals import head

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 0.3


def in_blocks(x: torch.Tensor, b: int) -> torch.Tensor:
    """[B, S, H, D] -> [B, H, nb, b, D]"""
    return x.transpose(1, 2).unflatten(2, (-1, b))


@pytest.mark.parametrize(("block_size", "rows"), [(16, range(16)), (64, range(1, 64, 2)), (128, range(2, 128, 4))])
def test_what_is_unsettled_is_told_by_single_queries(block_size: int, rows: range) -> None:
    assert sampled_rows(block_size) == rows
    q, k, v = video_like(4, 2, 3 * block_size, 2, 8, torch.float64)
    k = k[:, :, :1]  # which two heads of queries share
    alone = video_like(5, 2, 5, 1, 8, torch.float64)[1].transpose(1, 2)
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    qt, kt, vt = (in_blocks(x, block_size) for x in (q, k, v))
    got = unsettled(qt, pool(qt, kt, vt, RECTIFY["row"]), alone, valid, SCALE)
    for z, h, n in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        squares = []
        for i in rows:
            query = SCALE * qt[z, h, n, i]
            half = 0.5 * (query**2 * kt[z, 0].var(1, unbiased=False)).sum(1)
            logits = kt[z, 0].mean(1) @ query + math.log(block_size) + half.clamp(max=2)
            share = torch.cat([logits, alone[z, 0, valid[z]] @ query]).softmax(0)[:3]
            squares.append(share**2 * 2 * half)
        torch.testing.assert_close(got[z, h, n], torch.stack(squares).mean(0).sqrt())


@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
def test_exchanges_bring_tokens_of_a_block_nearer_each_other(kind: str) -> None:
    points = torch.randn(2, 9 * 64, 8, generator=torch.Generator().manual_seed(0))
    points = {"normal": points, "few values": points.round(), "equal": torch.zeros_like(points)}[kind]
    points = points.to(torch.bfloat16)
    order = arrange.k_d_order(points, 64)
    got = exchanged(points, order, 64)
    assert torch.equal(got.sort().values, order.sort().values)
    before, after = (spread(points, each) for each in (order, got))
    assert (after < 0.99 * before) if kind != "equal" else torch.equal(got, order)
    if kind != "normal":  # sums of whole numbers are exact
        by_kernel = order.int().contiguous()
        single_query_kernels.exchange(points, by_kernel, 64)
        assert torch.equal(by_kernel.long(), got)


def spread(points: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """How far points are from the mean of their block, in squares."""
    blocks = points.double().gather(1, order[..., None].expand_as(points)).unflatten(1, (-1, 64))
    return (blocks - blocks.mean(2, keepdim=True)).square().sum()


def test_kernels_do_as_the_rule_says() -> None:
    config = SparseConfig(rectify="row+slope", order="content", block_size=64)
    case = Case(SHAPES["tiny"], config, torch.float32, torch.device("cpu"))
    single_query_kernels.check(single_query_kernels.case_inputs(case))


def test_the_tail_is_the_operators_and_single_queries_leave_less_error() -> None:
    one = head((8, 8, 8))
    full = groups.exact(one)
    expected, stats = one.call.sparse(SparseConfig(sparsity=0.7, top_p=0.0, block_size=64, rectify="row"))
    blocks = groups.consecutive(stats.token_order[0, 0], 64)
    parts = single_queries.Parts(blocks, blocks, ingredients.estimate(one, blocks, blocks))
    out = single_queries.attended(one, parts, stats.block_mask[0, 0], "mean")
    torch.testing.assert_close(out, expected[0, :512, 0], atol=1e-4, rtol=1e-3)
    own = single_queries.attended(one, parts, stats.block_mask[0, 0], "own")
    assert relative_error(own, full) < relative_error(out, full)


def test_every_setting_partitions_the_tokens_and_stays_within_its_budget() -> None:
    one = head((8, 8, 8))
    full = groups.exact(one)
    for setting in single_queries.SETTINGS:
        name, choice, tail = setting.split()
        found = single_queries.grouped(one, name, 64)
        assert all(of.size.sum() == len(one.q) for of in found)
        parts = single_queries.Parts(*found, ingredients.estimate(one, *found))
        out, exact = single_queries.answer(one, parts, choice, tail, 0.6, 64)
        assert 0 < exact < 0.6
        assert relative_error(out, full) < 0.5, setting
