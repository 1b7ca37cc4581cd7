"""Grouped-query attention: key heads that several query heads share. The property tests draw such calls, too."""

import pytest
import torch

import rectified_spaattn as rsa
from attention_calls import smooth_call
from cases import MODES, Call, kernel_budget, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends.triton.plan import decide
from rectified_spaattn.backends.triton.tile import tile
from rectified_spaattn.lab.calls.capture import arrange
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.lab.calls.maps import one_head
from studies import groups
from test_kernels import CASES, EXACT, call, error_of, run, staged

LAYOUT = TokenLayout.build((3, 8, 11), text=7)  # 8 blocks of 32 and 8 leftover tokens
HEADS, KEY_HEADS, GROUP = 6, 2, 3


def grouped(mode: str, order: str = "gilbert", dtype: torch.dtype = torch.float32, head_dim: int = 16) -> Call:
    config = SparseConfig(rectify=mode, order=order, block_size=32, sparsity=0.7, top_p=0.2)  # type: ignore[arg-type]
    qkv = video_like(0, 2, LAYOUT.sequence, HEADS, head_dim, dtype, KEY_HEADS)
    return Call(LAYOUT, config, qkv, {"text_mask": torch.arange(7) < torch.tensor([[7], [3]])})


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(GROUP, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("order", ["gilbert", "content"])
def test_it_is_the_call_with_its_keys_repeated(mode: str, order: str, backend: str) -> None:
    """With its order and, where blocks are chosen in the directions of a group, with its blocks."""
    call = grouped(mode, order)
    options = {**call.options, "backend": backend, "return_stats": True}
    out, stats = rectified_attention(*call.arguments, **options)
    assert stats.block_mask.shape[:2] == stats.probability.shape[:2] == stats.r.shape[:2] == (2, HEADS)
    if stats.token_order is not None:
        assert stats.token_order.shape == (2, KEY_HEADS, 8 * 32)
        options["token_order"] = stats.token_order.repeat_interleave(GROUP, 1)
    if call.config.rule.choice == "error":
        options["block_mask"] = stats.block_mask
    q, k, v = call.qkv
    want, other = rectified_attention(q, repeated(k), repeated(v), call.layout, call.config, **options)
    assert torch.equal(stats.block_mask, other.block_mask)
    assert torch.equal(stats.compensated, other.compensated)
    assert stats.density == other.density
    torch.testing.assert_close(stats.probability, other.probability, rtol=1e-5, atol=1e-7)
    tiled = call.blocks.tiled
    if mode == "none" and backend == "torch":  # the same products of the same matrices
        assert torch.equal(out[:, tiled], want[:, tiled])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_query_heads_of_a_group_choose_their_own_blocks(backend: str) -> None:
    call = grouped("row", "content")
    _, stats = rectified_attention(*call.arguments, backend=backend, return_stats=True)
    masks = stats.block_mask.unflatten(1, (KEY_HEADS, GROUP))
    assert (masks[:, :, 0] != masks[:, :, 1]).flatten(1).any(1).all()


def test_sorting_takes_the_mean_query_of_a_group() -> None:
    """Equal query heads are one head; the others count."""
    call = grouped("row", "content")
    q, k, v = call.qkv

    def order_of(q: torch.Tensor) -> torch.Tensor:
        order = rectified_attention(q, k, v, LAYOUT, call.config, return_stats=True)[1].token_order
        assert order is not None
        return order

    assert torch.equal(order_of(repeated(q[:, :, ::GROUP])), order_of(q[:, :, ::GROUP]))
    assert not torch.equal(order_of(q), order_of(q[:, :, ::GROUP]))


@pytest.mark.parametrize("order", ["gilbert", "content"])
def test_a_plan_is_of_both_numbers_of_heads(order: str) -> None:
    call = grouped("row", order)
    plan = rsa.plan(*call.arguments, **call.options)
    assert plan.kept.shape[:2] == (2, HEADS)
    assert torch.equal(rsa.attend(*call.qkv, plan), rectified_attention(*call.arguments, **call.options))
    q, k, v = call.qkv
    with pytest.raises(ValueError, match=r"k: got 6 heads; allowed by the plan: 2\."):
        rsa.attend(q, repeated(k), repeated(v), plan)


@pytest.mark.parametrize("head_dim", [16, 48, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_that_are_multiples_of_16(head_dim: int, dtype: torch.dtype) -> None:
    call = grouped("query+slope", dtype=dtype, head_dim=head_dim)
    out, stats = rectified_attention(*call.arguments, **call.options, backend="torch", return_stats=True)
    options = {**call.options, "block_mask": stats.block_mask, "backend": "reference"}
    want = rectified_attention(*call.arguments, **options)
    budget = kernel_budget(call.qkv, call.layout, call.options["text_mask"])
    assert (out.double() - want).abs().max() <= budget * want.abs().max()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_under_autocast_it_is_the_same() -> None:
    call = grouped("row", "content")
    halves = [x.bfloat16() for x in call.qkv]
    want = rectified_attention(*halves, *call.arguments[3:], **call.options)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rectified_attention(q, k, v, *call.arguments[3:], **call.options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(attend(*call.qkv), want)
        assert torch.equal(compiled(*call.qkv), want)


def test_the_study_makes_groups_of_calls() -> None:
    call = smooth_call(heads=4)
    one = groups.grouped(call, (0, 2), "first")
    assert (one.q.shape[2], one.k.shape[2], one.v.shape[2]) == (2, 1, 1)
    torch.testing.assert_close(full_attention(one)[:, :, 0], full_attention(call)[:, :, 0])
    options = groups.Options(sparsity=(0.75,), block_size=32)
    rows = list(groups.measured([call], options))
    assert len(rows) == len(groups.GROUPS) * len(groups.KEYS) * len(options.mode) * len(groups.WAYS)
    assert all(0 < row["error"] < 1 for row in rows)


def test_one_head_of_a_captured_call_has_its_key_head() -> None:
    call = groups.grouped(smooth_call(heads=4), (0, 1, 2), "mean")
    alone = one_head(call, 2)
    torch.testing.assert_close(full_attention(alone)[:, :, 0], full_attention(call)[:, :, 2])
    config = SparseConfig(block_size=32, sparsity=0.5)
    out, stats = call.sparse(config)
    sorted_call = call.in_order(config)
    again, _ = sorted_call.sparse(config)
    assert stats.token_order is not None
    moved = arrange(out, call.blocks(config).tiled, stats.token_order)
    torch.testing.assert_close(moved, again, rtol=1e-4, atol=1e-5)


KERNELS = [(3, 1, "ragged", "ipar+gapr"), (2, 1, "96", "query+slope"), (4, 2, "plain", "pooled")]


@pytest.mark.parametrize(("heads", "key_heads", "case", "mode"), KERNELS)
def test_kernels(heads: int, key_heads: int, case: str, mode: str) -> None:
    """Every statistic against the stages, the output against the reference, which tells heads by h // (H // Hk)."""
    layout, inputs = call(CASES[case], batch=1, heads=heads, key_heads=key_heads, rectify=mode)
    tiled = tile(inputs)
    assert tiled.k.shape[1] == tiled.v_tail.shape[1] == tiled.pooled.k.shape[2] == key_heads
    choices, rectification, _ = decide(inputs, tiled)
    want, want_rectification = staged(inputs)
    torch.testing.assert_close(choices.probability.double(), want.probability, rtol=2e-4, atol=1e-6)
    assert torch.equal(choices.block_mask, want.block_mask)
    assert torch.equal(choices.compensated, want.compensated)
    torch.testing.assert_close(rectification.c.double(), want_rectification.c, rtol=2e-4, atol=1e-5)
    slope, exact_slope = rectification.slope, want_rectification.slope
    if slope is not None and exact_slope is not None:
        allowed = max(torch.finfo(EXACT).eps, 2e-5) * exact_slope.abs().max().item()
        torch.testing.assert_close(slope.double(), exact_slope, rtol=0, atol=allowed)
    out, stats = run(layout, inputs, block_mask=choices.block_mask)
    exact, truth = run(layout, inputs, "reference", block_mask=choices.block_mask)
    assert torch.equal(stats.compensated, truth.compensated)
    budget = kernel_budget(inputs[:3], layout, inputs.text_mask)
    assert error_of(out, exact) <= budget * exact.abs().max().item()
