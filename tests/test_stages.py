"""Stages 1 to 5, one by one, on numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import choose_blocks
from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.config import RECTIFY, Rule
from rectified_spaattn.method.estimate import estimate
from rectified_spaattn.method.gain import gain
from rectified_spaattn.method.pool import Pooled, pool
from rectified_spaattn.method.rectify import rectify
from rectified_spaattn.method.select import select
from rectified_spaattn.method.tail import CAP, half_variance, pooled_keys
from rectified_spaattn.orders import blocks_of

NONE, POOLED, IPAR, GAPR, ROW = (RECTIFY[mode] for mode in ("none", "pooled", "ipar", "ipar+gapr", "row"))


def choose(probability: list[list[float]], blocks: int, frames: int = 1, **settings: Any) -> list[list[int]]:
    """The kept blocks of every row of P [rows of nb + 1], where a block is a row of 16 tokens in a frame."""
    config = SparseConfig(block_size=16, **{"order": "raster", "top_p": 0.0, **settings})
    layout = TokenLayout.build((frames, blocks // frames, 16))
    mask = select(torch.tensor(probability)[None, None], blocks_of(layout, config), config)
    assert mask.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in mask[0, 0]]


# --- pool


def test_pool_by_hand() -> None:
    x = torch.tensor([[0.0, 4.0], [2.0, -4.0], [4.0, 4.0], [6.0, -4.0]])[None, None, None]  # one block of 4, D = 2
    got = pool(x, 2 * x + 1, -x, GAPR)
    assert got.q.flatten().tolist() == [3.0, 0.0]
    assert got.dq.flatten().tolist() == [2.0, 4.0]  # mean absolute, not squared, deviation
    assert got.k.flatten().tolist() == [7.0, 1.0]
    assert got.dk.flatten().tolist() == [4.0, 8.0]
    assert got.v.flatten().tolist() == [-3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pool_is_float32_for_halves(dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 1, 128, 4), 1.0, dtype=dtype)
    x[..., 0, :] = 1.0078125  # one step of bfloat16 above 1: a mean in half precision would lose it
    got = pool(x, x, x, GAPR)
    assert {part.dtype for part in got if part is not None} == {torch.float32}
    assert got.k_var is None
    exact = x.double().mean(3)
    torch.testing.assert_close(got.v.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.dq.double(), (x.double() - exact.unsqueeze(3)).abs().mean(3), rtol=1e-3, atol=0)


def test_pool_gives_the_spread_that_is_asked_for() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 5.0]).view(1, 1, 1, 4, 1)
    got = pool(x, 2 * x, x, ROW)
    assert got[3:5] == (None, None)
    assert got.k_var.item() == 12.0  # of 2, 2, 2, 10 around 4: (3 * 4 + 36) / 4
    assert pool(x, x, x, IPAR)[3:] == (None, None, None)
    assert None not in pool(x, x, x, Rule(gate="gain", tail=True))
    with pytest.raises(ValueError, match="without deviations"):
        gain(got, torch.zeros(1, 1, 1, 1, dtype=torch.bool), GAPR)


def test_tail_bias_is_what_the_spread_of_keys_adds_up_to_a_cap() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.full((1, 1, 1, 4096, 2), 1.0, dtype=torch.float64)
    k = 0.5 * torch.randn(1, 1, 1, 4096, 2, generator=generator, dtype=torch.float64)
    pooled, every = pool(q, k, k, ROW), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mass = (k[0, 0, 0].sum(-1)).exp().sum().log().item()  # log-sum-exp of the logits of q = (1, 1)
    mean = pooled.k.sum().item()
    tail = pooled_keys(pooled, every, half_variance(pooled, 1.0), 4096)
    assert (tail.k is pooled.k, tail.v is pooled.v) == (True, True)
    assert mean + tail.bias.item() == pytest.approx(mass, abs=0.02)
    assert mean + math.log(4096) < mass - 0.2  # what is missing without the variance
    large = half_variance(pooled, 100.0)
    assert pooled_keys(pooled, every, large, 4096).bias.item() == pytest.approx(math.log(4096) + CAP)
    assert pooled_keys(pooled, ~every, large, 4096).bias.item() == -math.inf
    with pytest.raises(ValueError, match="without the variance"):
        half_variance(pool(q, k, k, IPAR), 1.0)


def test_pool_of_large_halves_does_not_overflow() -> None:
    x = torch.full((1, 1, 1, 128, 4), 65504.0, dtype=torch.float16)
    x[..., 1::2, :] = -65504.0
    got = pool(x, x, x, GAPR)
    assert (got.q == 0).all()
    assert (got.dq == 65504).all()


def tensors(*values: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(value)[None, None] for value in values]


def test_estimate_by_hand() -> None:
    q_mean, k_mean, k_alone = tensors([[2.0], [0.0]], [[1.0], [-1.0]], [[0.5], [3.0]])
    valid = torch.tensor([[True, True]])
    got = estimate(q_mean, k_mean, k_alone, valid, rule=IPAR, scale=0.5, block_size=16, leftover=0)[0, 0]
    weights = [16 * math.e, 16 / math.e, math.exp(0.5), math.exp(3.0)]  # a block stands for its 16 tokens
    total = sum(weights)
    want = [weights[0] / total, weights[1] / total, (weights[2] + weights[3]) / total]
    torch.testing.assert_close(got[0], torch.tensor(want))
    torch.testing.assert_close(got[1], torch.tensor([16 / 34, 16 / 34, 2 / 34]))


def test_estimate_leaves_out_invalid_isolated_keys_whatever_they_hold() -> None:
    q_mean, k_mean, k_alone = tensors([[1.0]], [[1.0]], [[math.nan], [1.0], [math.inf]])
    settings: Any = {"rule": IPAR, "scale": 1.0, "block_size": 16, "leftover": 0}
    got = estimate(q_mean, k_mean, k_alone, torch.tensor([[False, True, False]]), **settings)
    torch.testing.assert_close(got.flatten(), torch.tensor([16 / 17, 1 / 17]))
    none = estimate(q_mean, k_mean, k_alone, torch.zeros(1, 3, dtype=torch.bool), **settings)
    assert none.flatten().tolist() == [1.0, 0.0]


def test_estimate_of_large_logits_does_not_overflow() -> None:
    q_mean, k_mean, k_alone = tensors([[1e4]], [[1e4], [-1e4]], [[9e3]])
    got = estimate(q_mean, k_mean, k_alone, torch.tensor([[True]]), rule=IPAR, scale=1.0, block_size=16, leftover=0)
    assert got.flatten().tolist() == [1.0, 0.0, 0.0]


def test_estimate_pooled_by_hand() -> None:
    """No log b; one column of the leftover tokens, one of every 16 text tokens, over the valid ones."""
    q_mean, k_mean = tensors([[1.0]], [[2.0], [0.0]])
    leftover, text = [[1.0], [3.0]], [[1.0]] * 8 + [[math.nan]] * 8 + [[-1.0], [math.nan]]
    k_alone = torch.tensor(leftover + text)[None, None]
    valid = torch.tensor([[True] * 10 + [False] * 8 + [True, False]])
    got = estimate(q_mean, k_mean, k_alone, valid, rule=POOLED, scale=1.0, block_size=16, leftover=2).flatten()
    weights = torch.tensor([2.0, 0.0, 2.0, 1.0, -1.0]).exp()
    want = torch.tensor([weights[0], weights[1], weights[2:].sum()]) / weights.sum()
    torch.testing.assert_close(got, want)


# --- select


@pytest.mark.parametrize(
    ("sparsity", "blocks", "kept"),
    [
        *((0, 10, 10), (0.5, 10, 5), (0.5, 7, 3), (0.75, 10, 2), (0.8, 20, 3), (0.8, 10, 1), (0.9, 9, 1)),
        *((0.99, 9, 1), (0.0001, 10, 9), (0.8, 21, 4), (0.8, 1, 1), (0.85, 100, 15)),
    ],
)
def test_top_k_is_literally_the_floor_of_the_kept_share_and_at_least_one(
    sparsity: float, blocks: int, kept: int
) -> None:
    """1 - 0.8 is a little below 0.2 in double precision, so 0.8 of 10 blocks keeps one."""
    assert kept == max(1, math.floor((1 - sparsity) * blocks))
    row = [float(m + 1) / 1000 for m in range(blocks)]
    want = list(range(blocks - kept, blocks))
    assert choose([[*row, 0.0]] * blocks, blocks, sparsity=sparsity) == [want] * blocks


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, [0]),
        (0.25, [0]),  # the isolated tokens hold it already: none is asked for, and top_k keeps its one
        (0.5, [0]),
        (0.51, [0, 2]),
        (0.625, [0, 2]),
        (0.75, [0, 2, 3]),
        (0.8, [0, 2, 3, 5]),
        (0.9, [0, 1, 2, 3, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_top_p_keeps_the_fewest_blocks_that_reach_it_with_the_isolated_mass(top_p: float, kept: list[int]) -> None:
    row = [0.25, 0.0625, 0.125, 0.125, 0.0625, 0.125, 0.25]  # isolated: 0.25
    assert choose([row] * 6, 6, sparsity=0.95, top_p=top_p) == [kept] * 6


def test_top_p_and_top_k_do_not_add_up() -> None:
    row = [0.5, 0.2, 0.1, 0.1, 0.1, 0.0]
    assert choose([row] * 5, 5, sparsity=0.6, top_p=0.5)[0] == [0, 1]
    assert choose([row] * 5, 5, sparsity=0.6, top_p=0.9)[0] == [0, 1, 2, 3]


def test_equal_probabilities_keep_the_lower_index() -> None:
    assert choose([[0.125] * 9] * 8, 8, sparsity=0.5) == [[0, 1, 2, 3]] * 8
    row = [0.0625, 0.25, 0.0625, 0.25, 0.0625, 0.25, 0.0625]
    assert choose([row] * 6, 6, sparsity=0.3)[0] == [0, 1, 3, 5]
    assert choose([[1 / 256] * 201] * 200, 200, sparsity=0.9)[7] == list(range(19))


def test_neighbours_are_added_not_counted() -> None:
    row = [0.9, 0.05, 0.02, 0.01, 0.01, 0.01]
    got = choose([row] * 5, 5, sparsity=0.8, neighbours=True)
    assert got == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4]]


def test_first_frame_blocks_see_each_other() -> None:
    settings: dict[str, Any] = {"blocks": 4, "frames": 2, "sparsity": 0.9}
    p = [[0.1, 0.1, 0.1, 0.7, 0.0]] * 4
    assert choose(p, **settings, first_frame=True) == [[0, 1, 3], [0, 1, 3], [3], [3]]
    assert choose(p, **settings) == [[3]] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_keeps_every_block(bad: float) -> None:
    """Nothing says what could be left out; other rows stay as they are."""
    p = [[0.125, 0.5, 0.125, 0.25], [0.1, 0.1, bad, 0.1], [0.1, 0.6, 0.1, bad]]
    assert choose(p, 3, sparsity=0.9) == [[1], [0, 1, 2], [0, 1, 2]]


def test_top_p_of_one_keeps_all_even_where_a_rounded_sum_gets_there_before() -> None:
    assert choose([[1.0, 1e-9, 0.0, 0.0]] * 3, 3, sparsity=0.9, top_p=1) == [[0, 1, 2]] * 3


@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 24),
    levels=st.integers(1, 9),
    sparsity=st.floats(0, 0.99),
    top_p=st.sampled_from((0.0, 0.1, 0.35, 0.77, 0.99)),
    neighbours=st.booleans(),
    first_frame=st.booleans(),
)
def test_select_against_counting(
    seed: int, blocks: int, levels: int, sparsity: float, top_p: float, neighbours: bool, first_frame: bool
) -> None:
    """Few levels make many ties. float64, so that sums of P are the same however they are added up."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, levels + 1, (2, 2, blocks, blocks + 1), generator=generator).double()
    p = weights / weights.sum(-1, keepdim=True)
    place: Any = {"order": "gilbert", "neighbours": neighbours, "first_frame": first_frame}
    config = SparseConfig(sparsity=sparsity, top_p=top_p, rectify="row", block_size=16, **place)
    layout = TokenLayout.build((2, blocks, 8))
    assert torch.equal(select(p, blocks_of(layout, config), config), choose_blocks(p, layout, config))


# --- gain


@pytest.mark.parametrize(
    ("q", "k", "dq", "dk", "worth"),
    [
        ([2.0], [3.0], [1.0], [1.0], True),  # 6 > 3 + 2
        ([2.0], [3.0], [1.0], [1.5], False),  # 6 = 3 + 3: a draw is not a gain
        ([-2.0], [3.0], [1.0], [1.0], True),
        ([2.0], [-3.0], [1.0], [1.6], False),
        ([1.0, 1.0], [3.0, -2.0], [2.0, 3.0], [1.0, -0.5], True),  # |1| > |0| + |0.5|: the products may cancel
        ([1.0, 1.0], [3.0, -3.0], [0.0, 0.0], [0.0, 0.0], False),  # 0 > 0
    ],
)
def test_gain_against_error(q: list[float], k: list[float], dq: list[float], dk: list[float], worth: bool) -> None:
    parts = {name: torch.tensor(value)[None, None, None] for name, value in zip("qkab", (q, k, dq, dk), strict=True)}
    pooled = Pooled(q=parts["q"], k=parts["k"], v=parts["k"], dq=parts["a"], dk=parts["b"])
    dropped, kept = torch.zeros(1, 1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for rule in (GAPR, GAPR._replace(tail=True)):
        assert gain(pooled, dropped, rule).item() is worth
        assert not gain(pooled, kept, rule).item()
    for rule in (IPAR, POOLED, ROW):
        assert gain(pooled, dropped, rule).item()
        assert not gain(pooled, kept, rule).item()
    assert not gain(pooled, dropped, NONE).item()


# --- rectify


def test_rectify_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])[None, None]
    compensated = torch.tensor([[False, True, True], [False, False, False], [True, True, True]])[None, None]
    v_mean = torch.tensor([[1.0], [2.0], [4.0]])[None, None]
    r, c, *rest = rectify(p, compensated, v_mean)
    assert rest == [None, None]
    assert r.flatten().tolist() == [0.625, 1.0, 0.0]
    assert c.flatten().tolist() == [1.0, 0.0, 4.0]


def test_a_small_rest_is_not_lost_to_rounding() -> None:
    """1 - 0.99999998 is 0 or 1e-7 in float32: R is summed from what is left instead."""
    p = torch.tensor([0.5, 0.5, 3e-9, 1e-9])[None, None, None]
    r, *_ = rectify(p, torch.tensor([True, True, False])[None, None, None], torch.zeros(1, 1, 3, 1))
    torch.testing.assert_close(r.item(), 4e-9, rtol=1e-5, atol=0)
