"""The study of single queries: exchanges and their kernel, and its tail against the operator's."""

import pytest
import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.config import Rectify
from rectified_spaattn.lab.bench.shapes import SHAPES, Case
from rectified_spaattn.method import arrange
from studies import exchange_kernel, ingredients, single_queries
from studies.rivals import groups
from studies.rivals.contract import relative_error
from test_rivals import head

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
def test_exchanges_bring_tokens_of_a_block_nearer_each_other(kind: str) -> None:
    points = torch.randn(2, 9 * 64, 8, generator=torch.Generator().manual_seed(0))
    points = {"normal": points, "few values": points.round(), "equal": torch.zeros_like(points)}[kind]
    points = points.to(torch.bfloat16)
    order = arrange.k_d_order(points, 64)
    got = single_queries.exchanged(points, order, 64)
    assert torch.equal(got.sort().values, order.sort().values)
    before, after = (spread(points, each) for each in (order, got))
    assert (after < 0.99 * before) if kind != "equal" else torch.equal(got, order)
    if kind != "normal":  # sums of whole numbers are exact
        by_kernel = order.int().contiguous()
        exchange_kernel.exchange(points, by_kernel, 64)
        assert torch.equal(by_kernel.long(), got)


def spread(points: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """How far points are from the mean of their block, in squares."""
    blocks = points.double().gather(1, order[..., None].expand_as(points)).unflatten(1, (-1, 64))
    return (blocks - blocks.mean(2, keepdim=True)).square().sum()


def test_the_kernel_exchanges_as_the_study_does() -> None:
    config = SparseConfig(block_size=64)
    exchange_kernel.check(Case(SHAPES["tiny"], config, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(("tail", "mode"), [("mean", "row"), ("slope", "query+slope")])
def test_the_tail_is_the_operators(tail: str, mode: Rectify) -> None:
    one = head((8, 8, 8))
    expected, stats = one.call.sparse(SparseConfig(sparsity=0.7, top_p=0.0, block_size=64, rectify=mode))
    blocks = groups.consecutive(stats.token_order[0, 0], 64)
    parts = single_queries.Parts(blocks, blocks, ingredients.estimate(one, blocks, blocks))
    out = single_queries.attended(one, parts, stats.block_mask[0, 0], tail)
    torch.testing.assert_close(out, expected[0, :512, 0], atol=1e-4, rtol=1e-3)


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
