"""Selectors of critical blocks: the oracle, the floor, and what every one of them is judged by."""

import math

import pytest
import torch

from attention_calls import smooth_call
from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import attention_error, full_attention, kept_mass
from rectified_spaattn.method.select import top_k_of
from studies.selectors import (
    IN_USE,
    ORACLE,
    SELECTORS,
    best_as_many,
    estimated_masses,
    keep_best,
    recall,
    study_selection,
    true_masses,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SparseConfig(block_size=16, order="gilbert", rectify="ipar+gapr", neighbours=False, top_p=0.0)
SPARSITIES = (0.5, 0.8, 0.9)


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return smooth_call()


def test_true_masses_are_a_softmax_over_all_valid_keys_summed_by_block(call: AttentionCall) -> None:
    blocks = call.blocks(CONFIG)
    true = true_masses(call, blocks)
    assert true.shape == (2, 16, 17)
    torch.testing.assert_close(true.sum(-1), torch.ones(2, 16))
    valid = torch.cat([torch.ones(256, dtype=torch.bool), call.text_mask[0]])
    for head in range(2):
        logits = call.q[0, :, head].double() @ call.k[0, :, head].double().T / math.sqrt(16)
        weights = logits.masked_fill(~valid, -math.inf).softmax(-1)[blocks.tiled]
        masses = weights[:, blocks.tiled].view(16, 16, 16, 16).sum(3).mean(1)
        torch.testing.assert_close(true[head, :, :16].double(), masses, atol=1e-5, rtol=1e-5)
        isolated = weights[:, blocks.isolated].sum(1).view(16, 16).mean(1)
        torch.testing.assert_close(true[head, :, 16].double(), isolated, atol=1e-5, rtol=1e-5)


def test_the_estimate_is_the_plan_of_the_operator(call: AttentionCall) -> None:
    blocks = call.blocks(CONFIG)
    _, stats = call.sparse(CONFIG)
    torch.testing.assert_close(estimated_masses(call, blocks), stats.probability[0])
    kept = keep_best(SELECTORS["estimate P (in use)"](call, blocks), blocks, CONFIG.sparsity)
    assert torch.equal(kept, stats.block_mask[0])


def test_blocks_sorted_by_content_are_judged_in_that_order(call: AttentionCall) -> None:
    config = CONFIG.replace(order="content", rectify="row", sparsity=0.8)
    rows = {row.selector: row for row in study_selection(call, config, (0.8,))}
    error = attention_error(call, config)
    full = full_attention(call)
    assert error.stats.token_order is not None
    tiled = call.blocks(config).tiled
    out, _ = call.sparse(config)
    wanted = ((out - full)[:, tiled].norm() / full[:, tiled].norm()).item()
    assert rows[IN_USE].rectified == pytest.approx(wanted, rel=1e-3)


def test_equal_tokens_make_every_estimate_exact() -> None:
    """A block of equal keys and queries is its mean, so pooling loses nothing."""
    made = smooth_call(text=0)
    blocks = made.blocks(CONFIG)
    flat = {}
    for name in ("q", "k", "v"):
        x = getattr(made, name).clone()
        means = x[:, blocks.tiled].view(1, blocks.num_blocks, 16, 2, 16).mean(2, keepdim=True)
        x[:, blocks.tiled] = means.expand(-1, -1, 16, -1, -1).reshape(1, -1, 2, 16)
        flat[name] = x
    equal = AttentionCall(**{**vars(made), **flat})
    true = true_masses(equal, blocks)[..., :-1]
    for name in ("estimate P (in use)", "P + second order", "P of quarter blocks", "mean query, all keys"):
        torch.testing.assert_close(SELECTORS[name](equal, blocks), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_every_selector_keeps_exactly_as_many_blocks_as_asked_for(name: str, call: AttentionCall) -> None:
    blocks = call.blocks(CONFIG)
    scores = SELECTORS[name](call, blocks)
    assert scores.shape == (2, 16, 16)
    assert (scores >= 0).all()
    for sparsity in SPARSITIES:
        kept = keep_best(scores, blocks, sparsity)
        assert (kept.sum(-1) == top_k_of(CONFIG.replace(sparsity=sparsity), 16)).all()


def test_recall_and_kept_mass_by_hand() -> None:
    true = torch.tensor([[[0.4, 0.3, 0.1, 0.2], [0.1, 0.2, 0.6, 0.1], [0.3, 0.3, 0.3, 0.1]]])  # the last is isolated
    kept = torch.tensor([[[True, False, True], [False, True, True], [True, True, False]]])
    assert recall(kept, true) == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert kept_mass(kept, true) == pytest.approx((0.7 + 0.9 + 0.7) / 3)
    everything = torch.ones_like(kept)
    assert recall(everything, true) == 1
    assert kept_mass(everything, true) == pytest.approx(1)


def test_as_many_blocks_by_score_are_as_many_and_the_best_of_every_row(call: AttentionCall) -> None:
    blocks = call.blocks(CONFIG)
    scores = SELECTORS["estimate P (in use)"](call, blocks)
    kept = keep_best(scores, blocks, 0.8) | blocks.neighbours
    kept[1, :5] = True  # heads and rows that differ
    best = best_as_many(scores, kept)
    assert torch.equal(best.sum((1, 2)), kept.sum((1, 2)))
    per_row = best.sum(-1)
    assert (per_row.amax(1) - per_row.amin(1) <= 1).all()
    lowest_kept = scores.masked_fill(~best, math.inf).amin(-1)
    assert (scores.masked_fill(best, -math.inf).amax(-1) <= lowest_kept).all()
    even = keep_best(scores, blocks, 0.8)
    assert torch.equal(best_as_many(scores, even), even)


def test_the_oracle_finds_all_and_captures_most_and_chance_finds_its_share(call: AttentionCall) -> None:
    rows = study_selection(call, CONFIG, SPARSITIES)
    assert len(rows) == len(SPARSITIES) * (len(SELECTORS) + 1)
    by_place = {(row.selector, row.sparsity): row for row in rows}
    for sparsity in SPARSITIES:
        oracle, in_use, chance = (by_place[name, sparsity] for name in (ORACLE, "estimate P (in use)", "random"))
        assert oracle.recall == 1
        assert all(row.captured <= oracle.captured + 1e-6 for row in rows if row.sparsity == sparsity)
        assert chance.recall == pytest.approx(top_k_of(CONFIG.replace(sparsity=sparsity), 16) / 16, abs=0.12)  # 32 rows
        assert chance.recall < in_use.recall
        assert chance.captured < in_use.captured
        assert chance.plain > in_use.plain
    captured = [by_place[ORACLE, sparsity].captured for sparsity in SPARSITIES]
    assert captured == sorted(captured, reverse=True)


def test_selection_at_zero_sparsity_is_full_attention(call: AttentionCall) -> None:
    for row in study_selection(call, CONFIG, (0.0,)):
        assert row.recall == 1
        assert row.captured == pytest.approx(1)
        assert row.plain == pytest.approx(0, abs=1e-5)
        assert row.rectified == pytest.approx(0, abs=1e-5)
