"""Blocks chosen by the error they leave, and the slope of values in keys: stages by hand and by their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import kernel_budget, video_like
from oracle import dense
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends.triton import plan as kernels
from rectified_spaattn.backends.triton.directions import moments, of_errors
from rectified_spaattn.backends.triton.tile import tile
from rectified_spaattn.config import RECTIFY, Rectify
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.residual import (
    Directions,
    directions,
    residual,
    responses,
    sampled_rows,
    told_by_means,
    told_by_queries,
)
from rectified_spaattn.method.select import largest, select, top_k_of
from rectified_spaattn.method.slope import slope
from rectified_spaattn.method.tail import half_variance
from rectified_spaattn.orders import blocks_of

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULE = RECTIFY["row+slope"]
SCALE = 0.3


def in_blocks(x: torch.Tensor, b: int) -> torch.Tensor:
    # [B, S, H, D] -> [B, H, nb, b, D]
    return x.transpose(1, 2).unflatten(2, (-1, b))


def moving_together(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (k - k.mean(0)).T @ (v - v.mean(0)) / len(k)


def residuals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: int, probability: torch.Tensor) -> torch.Tensor:
    tiled = [in_blocks(x, b) for x in (q, k, v)]
    spread = half_variance(pool(*tiled, RULE), SCALE)
    seen = directions(q, k, torch.arange(q.shape[1]), SCALE)
    return residual(told_by_means(probability, spread), responses(*tiled, seen))


@pytest.mark.parametrize(("block_size", "rows"), [(16, range(16)), (64, range(1, 64, 2)), (128, range(2, 128, 4))])
def test_single_queries_tell_where_they_look(block_size: int, rows: range) -> None:
    assert sampled_rows(block_size) == rows
    q, k, v = video_like(4, 2, 3 * block_size, 2, 8, torch.float64)
    k = k[:, :, :1]  # which two heads of queries share
    alone = video_like(5, 2, 5, 1, 8, torch.float64)[1].transpose(1, 2)
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    qt, kt, vt = (in_blocks(x, block_size) for x in (q, k, v))
    got = told_by_queries(qt, pool(qt, kt, vt, RULE), alone, valid, SCALE)
    for z, h, n in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        squares = []
        for i in rows:
            query = SCALE * qt[z, h, n, i]
            half = 0.5 * (query**2 * kt[z, 0].var(1, unbiased=False)).sum(1)
            logits = kt[z, 0].mean(1) @ query + math.log(block_size) + half.clamp(max=2)
            share = torch.cat([logits, alone[z, 0, valid[z]] @ query]).softmax(0)[:3]
            squares.append(share**2 * 2 * half)
        torch.testing.assert_close(got[z, h, n], torch.stack(squares).mean(0).sqrt())


@pytest.mark.parametrize("head_dim", [3, 8])
def test_up_to_eight_columns_the_residual_is_exact(head_dim: int) -> None:
    q, k, v = video_like(1, 2, 96, 2, head_dim, torch.float64)
    p = torch.rand(2, 2, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = residuals(q, k, v, 16, p)
    qt, kt, vt = (in_blocks(x, 16) for x in (q, k, v))
    for z, h, n, m in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        keys, queries = kt[z, h, m], qt[z, h, n]
        sigma = SCALE * (queries.mean(0) ** 2 * keys.var(0, unbiased=False)).sum().sqrt()
        moved = SCALE * queries @ moving_together(keys, vt[z, h, m])
        want = p[z, h, n, m] * sigma * moved.square().sum(1).mean().sqrt()
        assert got[z, h, n, m].item() == pytest.approx(want.item(), rel=1e-9)


def test_more_columns_lose_only_what_lies_outside_eight_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    long = torch.tensor([1.0] * 8 + [1e-4] * 24, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    q, k, v = (x * long @ turn for x in video_like(3, 1, 256, 1, 32, torch.float64))
    flat = [(x @ turn.T)[..., :8] for x in (q, k)]
    # the spread is told along the axes, which differ: compared is what the directions see
    tiled, narrow = [in_blocks(x, 16) for x in (q, k, v)], [in_blocks(x, 16) for x in (*flat, v)]
    ones, places = torch.ones(1, 1, 16, 16, dtype=torch.float64), torch.arange(256)
    got = residual(ones, responses(*tiled, directions(q, k, places, SCALE)))
    want = residual(ones, responses(*narrow, directions(*flat, places, SCALE)))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e18, math.inf, math.nan])
def test_what_cannot_be_told_apart_has_no_residual(value: float) -> None:
    """Equal keys, or numbers that are none or have no product: zeros, not NaN."""
    q, k, v = video_like(1, 1, 64, 1, 8)
    if value == 1e18:
        q, k = q * value, k * value
    k = torch.full_like(k, 1.5) if value == 0 else k
    q[0, 5] = q[0, 5] if value == 0 else value
    seen = directions(q, k, torch.arange(64), SCALE)
    assert not any(x.isnan().any() for x in seen)
    assert largest(residuals(q, k, v, 16, torch.ones(1, 1, 4, 5)), 8).any(-1).all()


scores = st.integers(1, 7).flatmap(
    lambda nb: st.lists(st.lists(st.integers(0, 6), min_size=nb, max_size=nb), min_size=nb, max_size=nb)
)


@settings(max_examples=150)
@given(values=scores, top_k=st.integers(1, 7))
def test_the_largest_of_a_head_and_of_every_row(values: list[list[int]], top_k: int) -> None:
    score = torch.tensor(values, dtype=torch.float32)[None, None]
    nb = len(values)
    keep = largest(score, min(top_k, nb) * nb)[0, 0]
    score = score[0, 0]
    assert keep.sum() <= min(top_k, nb) * nb
    first = score.argmax(-1)
    assert keep[torch.arange(nb), first].all()
    others = torch.ones_like(keep)
    others[torch.arange(nb), first] = False
    kept, dropped = score[keep & others], score[~keep]
    if len(kept) and len(dropped):
        assert kept.min() > dropped.max()
    if len(dropped):  # the next value would not fit, with all that equal it
        more = keep | (others & (score == dropped.max()))
        assert more.sum() > min(top_k, nb) * nb


@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
def test_select_adds_what_top_p_asks_for(top_p: float) -> None:
    layout = TokenLayout.build((1, 10, 16))
    config = SparseConfig(rectify="row+slope", block_size=16, sparsity=0.7, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 2, 10, 11, generator=generator).mul(2).softmax(-1)
    left = torch.rand(1, 2, 10, 10, generator=generator)
    got = select(p, blocks_of(layout, config), config, left)
    by_mass = select(p, blocks_of(layout, config), config.replace(rectify="row", sparsity=0.99))
    want = largest(left, top_k_of(config, 10) * 10)
    assert torch.equal(got | by_mass, got) or top_p == 0  # then it is the best by mass of every row
    assert torch.equal(want | got, got)
    if top_p == 0:
        assert torch.equal(got, want)
        assert got.sum((2, 3)).tolist() == [[30, 30]]
    assert got.all() == (top_p == 1)


def test_slope_is_the_mean_of_blocks_by_their_mass_in_tails() -> None:
    q, k, v = (in_blocks(x, 16) for x in video_like(5, 1, 80, 2, 8, torch.float64))
    pooled = pool(q, k, v, RULE)
    spread = half_variance(pooled, SCALE)
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 2, 5, 6, generator=generator, dtype=torch.float64)
    compensated = torch.rand(1, 2, 5, 5, generator=generator) < 0.5
    compensated[..., 3] = False
    k[0, 0, 3] = torch.nan  # what no tail holds need not be a number
    got = slope(p, spread, compensated, k, v, pool(q, k, v, RULE), SCALE)
    for h in range(2):
        total, mass = torch.zeros(8, 8, dtype=torch.float64), 0.0
        for m in (0, 1, 2, 4):
            own = sum(
                p[0, h, n, m].item() * math.exp(min(spread[0, h, n, m].item(), 2.0))
                for n in range(5)
                if compensated[0, h, n, m]
            )
            total, mass = total + own * moving_together(k[0, h, m], v[0, h, m]), mass + own
        torch.testing.assert_close(got[0, h], SCALE * total / mass)
    assert not slope(p, spread, torch.zeros_like(compensated), k, v, pooled, SCALE).any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_values_that_follow_keys_linearly_are_given_to_first_order(backend: str) -> None:
    """v = A k: the error of the tail is of second order, not of first, in the spread of logits."""
    layout = TokenLayout.build((4, 8, 8))
    q, k, _ = (x.to(DEVICE) for x in video_like(7, 1, 256, 1, 64))
    v = k @ torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE) / 8
    half = torch.float16 if DEVICE.type == "cuda" and backend == "triton" else torch.float32
    q, k, v = (x.to(half) for x in (q, k, v))
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    errors = {}
    for mode in ("row", "row+slope", "query+slope"):
        config = SparseConfig(rectify=mode, block_size=64, order="raster")
        want = dense(q, k, v, scale=0.02)
        out = rectified_attention(q, k, v, layout, config, scale=0.02, block_mask=nothing, backend=backend)
        errors[mode] = ((out.double() - want).norm() / want.norm()).item()
    assert max(errors["row+slope"], errors["query+slope"]) < 0.2 * errors["row"]


@pytest.mark.parametrize("head_dim", [64, 128] if DEVICE.type == "cuda" else [64])  # interpreting takes long
@pytest.mark.parametrize("mode", ["row+slope", "query+slope"])
def test_kernels_choose_by_the_residuals_of_the_stage(mode: Rectify, head_dim: int) -> None:
    layout = TokenLayout.build((4, 9, 13), 13)  # 7 blocks of 64
    config = SparseConfig(rectify=mode, block_size=64, sparsity=0.7, top_p=0.0, order="gilbert")
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    q, k, v = (x.to(DEVICE) for x in video_like(9, 1, layout.sequence, 2, head_dim, dtype))
    blocks = blocks_of(layout, config).on(DEVICE)
    valid = torch.ones(1, 13, dtype=torch.bool, device=DEVICE)
    inputs = Inputs(q, k, v, blocks, config, valid, head_dim**-0.5)
    tiled = tile(inputs)
    choices, bias, lists = kernels.empty(inputs, tiled)
    got = kernels.scores(inputs, tiled, choices, bias)
    kernels.select(inputs, choices, bias, lists, got)
    assert torch.equal(choices.block_mask, largest(got, top_k_of(config, 7) * 7))
    assert choices.block_mask.sum((2, 3)).tolist() == [[14, 14]]

    places = [x[:, blocks.tiled].double() for x in (q, k, v)]
    parts = [in_blocks(x, 64) for x in places]
    # the same directions: where spreads are close, an iteration parts them otherwise than exact eigenvectors do
    found = of_errors(moments(q, k, blocks.tiled, inputs.scale), 2, inputs.scale, dtype)
    seen = Directions(*(x.double() for x in found))
    pooled = pool(*parts, RULE)
    if mode == "query+slope":
        told = told_by_queries(parts[0], pooled, k[:, blocks.isolated].transpose(1, 2), inputs.valid, inputs.scale)
    else:
        told = told_by_means(choices.probability.double(), half_variance(pooled, inputs.scale))
    want = residual(told, responses(*parts, seen))
    assert (got == math.inf).sum(-1).eq(1).all()
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    others = got < math.inf
    rounding = 8 * torch.finfo(dtype).eps + 2.0**-14  # each response is rounded to the inputs' dtype a few times
    torch.testing.assert_close(got[others].double(), want[others], rtol=rounding, atol=0)


def test_directions_of_the_kernel_span_what_those_of_the_stage_span() -> None:
    generator = torch.Generator().manual_seed(0)
    long = torch.linspace(3, -3, 64).exp()  # a spectrum whose directions are far apart
    q, k = ((torch.randn(1, 900, 2, 64, generator=generator) * long).to(DEVICE) for _ in "qk")
    k += 5
    places = torch.arange(900, device=DEVICE)
    want, got = directions(q, k, places, SCALE), of_errors(moments(q, k, places, SCALE), 2, SCALE, torch.float32)
    apart = (k - k.mean(1)).transpose(1, 2)
    covariance = apart.transpose(2, 3) @ apart / 900
    one = torch.eye(8, device=DEVICE).expand(1, 2, 8, 8)
    torch.testing.assert_close(got.k.transpose(2, 3) @ covariance @ got.k, one, rtol=0, atol=1e-4)
    both = got.k.transpose(2, 3) @ covariance @ want.k
    torch.testing.assert_close(torch.linalg.svdvals(both), one.diagonal(dim1=2, dim2=3), rtol=0, atol=0.02)
    torch.testing.assert_close(got.q, SCALE * covariance @ got.k, rtol=1e-3, atol=1e-3)


def test_longest_rows_first_changes_nothing() -> None:
    """The order in which query blocks are attended to is not seen in the output: fed back, the same choices give it."""
    layout = TokenLayout.build((4, 5, 25), 13)
    config = SparseConfig(rectify="query+slope", block_size=64, sparsity=0.7, top_p=0.0)
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    q, k, v = (x.to(DEVICE) for x in video_like(4, 1, layout.sequence, 1, 64, dtype))
    out, stats = rectified_attention(q, k, v, layout, config, return_stats=True, backend="triton")
    counts = stats.block_mask.sum(-1)
    assert counts.min() >= 1
    assert counts.max() > counts.min()
    options = {"block_mask": stats.block_mask, "token_order": stats.token_order}
    again = rectified_attention(q, k, v, layout, config, backend="triton", **options)
    assert torch.equal(out, again)
    want = rectified_attention(q, k, v, layout, config, backend="reference", **options)
    budget = kernel_budget((q, k, v), layout, torch.ones(1, 13, dtype=torch.bool, device=DEVICE))
    assert (out.double() - want).abs().max() <= budget * want.abs().max()
