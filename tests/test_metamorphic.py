"""What must hold whatever the numbers are: relations between calls, and with plain full attention."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import MODES, Call, calls, video_like
from oracle import dense, membership, sdpa
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.orders import blocks_of

ODD = TokenLayout.build((5, 7, 9), text=13)  # 9 blocks of 32, 27 leftover tokens, 13 text tokens
CLOSE: dict[str, float] = {"rtol": 2e-5, "atol": 2e-6}  # float32: two roundings of values near 1, in other orders


def config_of(mode: str, **changed: Any) -> SparseConfig:
    return SparseConfig(**{"rectify": mode, "order": "gilbert", "block_size": 32, "top_p": 0.2, **changed})


def exact(call: Call, config: SparseConfig | None = None, **changed: Any) -> torch.Tensor:
    """float64, so that relations hold to its rounding and no selection flips."""
    q, k, v = (changed.pop(name, x).double() for name, x in zip("qkv", call.qkv, strict=True))
    options = {**call.options, **changed}
    return rectified_attention(q, k, v, call.layout, config or call.config, **options, backend="reference")


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


# --- against full attention


@given(call=calls(), by_mask=st.booleans())
def test_all_blocks_kept_is_full_attention(call: Call, by_mask: bool) -> None:
    """Nothing is dropped, so nothing is compensated, whatever the mode."""
    options = dict(call.options)
    config = call.config if by_mask else call.config.replace(sparsity=0)
    batch, _, heads, _ = call.qkv[0].shape
    if by_mask:
        options["block_mask"] = torch.ones(batch, heads, call.blocks.num_blocks, call.blocks.num_blocks).bool()
    out, stats = rectified_attention(*call.qkv, call.layout, config, **options, return_stats=True)
    torch.testing.assert_close(out, sdpa(*call.qkv, sees=call.valid, scale=options["scale"]), **CLOSE)
    assert stats.block_mask.all()
    assert not stats.compensated.any()
    assert stats.density == pytest.approx(1, abs=2e-7)
    torch.testing.assert_close(stats.r, torch.ones_like(stats.r), rtol=0, atol=1e-6)


@given(call=calls(modes=("ipar", "ipar+gapr"), min_blocks=1), keep=st.sampled_from((0.0, 0.3, 0.7)))
def test_block_constant_q_and_k_make_rectification_exact(call: Call, keep: float) -> None:
    """Then a pooled column is what its tokens would have got, so any selection gives full attention. (Deviations are
    zero, so GAPR compensates all that IPAR does.) Isolated tokens need not be constant: they are exact anyway.
    """
    member = membership(call.layout, call.config)
    tiled = member.sum(1) > 0
    q, k, v = (x.double() for x in call.qkv)
    for x in (q, k):
        means = torch.einsum("bshd,sn->bnhd", x, member / call.config.block_size)
        x[:, tiled] = torch.einsum("bnhd,sn->bshd", means, member)[:, tiled]
    call.qkv = (q, k, v)
    nb, (batch, _, heads, _) = call.blocks.num_blocks, q.shape
    mask = torch.rand(batch, heads, nb, nb, generator=torch.Generator().manual_seed(7)) < keep
    if not call.blocks.leftover:
        mask |= torch.eye(nb, dtype=torch.bool)
    want = dense(q, k, v, sees=call.valid, scale=call.options["scale"])
    same(exact(call, block_mask=mask), want)
    same(exact(call), want)
    floats = [x.float() for x in call.qkv]
    out = rectified_attention(*floats, call.layout, call.config.replace(rectify="ipar"), **call.options)
    torch.testing.assert_close(out, want.float(), **CLOSE)


@given(call=calls(modes=("none",)))
def test_without_rectification_it_is_masked_attention(call: Call) -> None:
    out, stats = rectified_attention(*call.arguments, **call.options, return_stats=True)
    member = membership(call.layout, call.config)
    tiled = member.sum(1) > 0
    sees = torch.einsum("bhnm,sn,tm->bhst", stats.block_mask.double(), member, member) > 0
    sees = (sees | ~tiled[:, None] | ~tiled) & call.valid
    torch.testing.assert_close(out, sdpa(*call.qkv, sees=sees, scale=call.options["scale"]), **CLOSE)
    assert not stats.compensated.any()
    torch.testing.assert_close(stats.r, torch.ones_like(stats.r), rtol=0, atol=1e-6)


@given(call=calls())
def test_isolated_queries_attend_densely(call: Call) -> None:
    out = rectified_attention(*call.arguments, **call.options)
    full = sdpa(*call.qkv, sees=call.valid, scale=call.options["scale"])
    alone = membership(call.layout, call.config).sum(1) == 0
    torch.testing.assert_close(out[:, alone], full[:, alone], **CLOSE)


# --- sums


@given(call=calls())
def test_sums_are_one(call: Call) -> None:
    _, stats = rectified_attention(*call.arguments, **call.options, return_stats=True)
    total = stats.probability.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert (stats.probability >= 0).all()
    mass = (stats.probability[..., :-1] * stats.compensated).sum(-1)
    torch.testing.assert_close(stats.r + mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    assert not (stats.compensated & stats.block_mask).any()
    assert 0 < stats.density <= 1 + 2e-7


@given(call=calls())
def test_output_is_an_average_of_values(call: Call) -> None:
    """The effective weights are not negative and sum to 1: constant values come back, and a shift shifts."""
    q, k, v = call.qkv
    ones = torch.ones_like(v)
    out = rectified_attention(q, k, ones, call.layout, call.config, **call.options)
    torch.testing.assert_close(out, torch.ones_like(q), **CLOSE)
    shift = torch.arange(float(v.shape[-1])) - 2
    plain = exact(call)
    same(exact(call, v=v.double() + shift), plain + shift)
    same(exact(call, v=-3 * v.double()), -3 * plain)
    assert (rectified_attention(q, k, v.abs(), call.layout, call.config, **call.options) >= 0).all()


# --- what does not matter


@given(call=calls(min_blocks=2), seed=st.integers(0, 99))
def test_batch_entries_and_heads_do_not_mix(call: Call, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, _, heads, _ = call.qkv[0].shape
    key_heads = call.qkv[1].shape[2]
    rows, groups = (torch.randperm(n, generator=generator) for n in (batch, key_heads))
    columns = torch.arange(heads).view(key_heads, -1)[groups].flatten()  # heads that share keys stay together
    places = {"q": columns, "k": groups, "v": groups}
    moved = {name: x[rows][:, :, places[name]] for name, x in zip("qkv", call.qkv, strict=True)}
    if "text_mask" in call.options:
        moved["text_mask"] = call.options["text_mask"][rows]
    want = exact(call)
    same(exact(call, **moved), want[rows][:, :, columns])
    got = rectified_attention(*call.arguments, **call.options)
    options = {**call.options, **{name: x for name, x in moved.items() if name == "text_mask"}}
    again = rectified_attention(*(moved[name] for name in "qkv"), call.layout, call.config, **options)
    torch.testing.assert_close(again, got[rows][:, :, columns], **CLOSE)


@given(call=calls(), power=st.sampled_from((-3, 1, 4)))
def test_only_the_product_of_q_and_scale_matters(call: Call, power: int) -> None:
    """GAPR compares unscaled logits, and both sides of it are linear in q."""
    scale = call.options["scale"] or call.qkv[0].shape[-1] ** -0.5
    a = 2.0**power
    same(exact(call, q=a * call.qkv[0], scale=scale / a), exact(call, scale=scale))


@given(call=calls(modes=("none", "pooled", "ipar")))
def test_the_same_vector_on_every_key_changes_nothing(call: Call) -> None:
    """All logits of a row move alike. (GAPR does look at absolute logits.)"""
    shift = torch.linspace(-1, 1, call.qkv[1].shape[-1], dtype=torch.float64)
    same(exact(call, k=call.qkv[1].double() + shift), exact(call))


@given(call=calls(min_blocks=2), seed=st.integers(0, 99))
def test_the_order_of_keys_within_a_block_does_not_matter(call: Call, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = call.blocks.tiled.view(call.blocks.num_blocks, call.config.block_size)
    places = torch.arange(call.layout.sequence)
    for block in blocks:
        places[block] = block[torch.randperm(len(block), generator=generator)]
    q, k, v = (x[:, places] for x in call.qkv)
    want = exact(call)
    same(exact(call, k=k, v=v), want)
    same(exact(call, q=q), want[:, places])


@pytest.mark.parametrize("mode", MODES)
def test_swapping_whole_blocks_swaps_their_outputs(mode: str) -> None:
    layout = TokenLayout.build((2, 8, 16), text=5)
    call = Call(layout, config_of(mode), video_like(0, 1, layout.sequence, 2, 8))
    blocks = call.blocks.tiled.view(8, 32)
    places = torch.arange(layout.sequence)
    places[blocks] = blocks[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    same(exact(call, **{name: x[:, places] for name, x in zip("qkv", call.qkv, strict=True)}), exact(call)[:, places])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_more_sparsity_keeps_fewer_blocks(mode: str, backend: str) -> None:
    q, k, v = video_like(1, 1, ODD.sequence, 2, 8)
    before = None
    densities = []
    for sparsity in (0.0, 0.2, 0.5, 0.7, 0.8, 0.9):
        config = config_of(mode, sparsity=sparsity)
        _, stats = rectified_attention(q, k, v, ODD, config, return_stats=True, backend=backend)
        assert before is None or (stats.block_mask <= before).all()
        before = stats.block_mask
        densities.append(stats.density)
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1
    assert densities[-1] < 0.5


@pytest.mark.parametrize("field", ["neighbours", "first_frame"])
def test_asking_for_more_blocks_only_adds(field: str) -> None:
    layout = TokenLayout.build((4, 8, 8))
    q, k, v = video_like(2, 1, layout.sequence, 2, 8)
    configs = [config_of("ipar", block_size=16, **{field: on}) for on in (False, True)]
    masks = [rectified_attention(q, k, v, layout, each, return_stats=True)[1].block_mask for each in configs]
    blocks = blocks_of(layout, configs[1])
    wanted = blocks.neighbours if field == "neighbours" else blocks.first_frame[:, None] & blocks.first_frame
    assert torch.equal(masks[1], masks[0] | wanted)
    assert masks[1].sum() > masks[0].sum()


# --- text


@given(call=calls())
def test_text_first_and_text_last_agree(call: Call) -> None:
    layout = call.layout
    assert layout.grid is not None
    text_first = layout.grid_start > 0
    other = TokenLayout.build(layout.grid, layout.text, not text_first)
    steps = -layout.text if text_first else layout.text
    moved = [x.roll(steps, dims=1) for x in call.qkv]
    got = rectified_attention(*moved, other, call.config, **call.options)
    want = rectified_attention(*call.arguments, **call.options)
    torch.testing.assert_close(got, want.roll(steps, dims=1), **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("backend", "text_first", "filler"),  # every pair of two of them
    [
        *(("torch", first, filler) for first, filler in ((False, torch.nan), (True, torch.inf), (False, 3e38))),
        *(("reference", first, filler) for first, filler in ((True, torch.nan), (False, torch.inf), (True, 3e38))),
    ],
)
def test_what_padded_text_holds_changes_nothing(mode: str, backend: str, text_first: bool, filler: float) -> None:
    layout = TokenLayout.build((5, 7, 9), text=40, text_first=text_first)
    q, k, v = video_like(3, 2, layout.sequence, 2, 8)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    call = Call(layout, config_of(mode), (q, k, v), {"text_mask": mask})
    padding = ~call.valid[:, 0, 0]
    config, options = call.config, {"text_mask": mask, "backend": backend, "return_stats": True}
    want, plan = rectified_attention(q, k, v, layout, config, **options)
    dirty_k, dirty_v = (x.masked_fill(padding[..., None, None], filler) for x in (k, v))
    got, stats = rectified_attention(q, dirty_k, dirty_v, layout, config, **options)
    assert torch.equal(got, want)
    for name in ("block_mask", "compensated", "probability", "r"):
        assert torch.equal(getattr(stats, name), getattr(plan, name)), name
    dirty_q = q.masked_fill(padding[..., None, None], filler)
    got = rectified_attention(dirty_q, dirty_k, dirty_v, layout, config, text_mask=mask, backend=backend)
    assert torch.equal(got[~padding], want[~padding])


# Text is pooled from its first token on, so padding on the left moves the pools of "pooled".
@pytest.mark.parametrize(
    ("mode", "side"), [*((mode, "right") for mode in MODES), *((mode, "left") for mode in MODES if mode != "pooled")]
)
@pytest.mark.parametrize("text_first", [False, True])
def test_a_batch_of_text_lengths_is_its_samples_one_by_one(mode: str, text_first: bool, side: str) -> None:
    grid, longest = (5, 7, 9), 33
    layout = TokenLayout.build(grid, text=longest, text_first=text_first)
    q, k, v = video_like(4, 4, layout.sequence, 2, 8)
    lengths = torch.tensor([33, 32, 5, 0])
    mask = torch.arange(longest) < lengths[:, None]
    if side == "left":
        mask = mask.flip(1)
    call = Call(layout, config_of(mode), (q, k, v), {"text_mask": mask})
    out = rectified_attention(*call.arguments, text_mask=mask)
    for i, length in enumerate(lengths.tolist()):
        keep = call.valid[i, 0, 0]
        alone = TokenLayout.build(grid, text=length, text_first=text_first)
        want = rectified_attention(q[i : i + 1, keep], k[i : i + 1, keep], v[i : i + 1, keep], alone, call.config)
        torch.testing.assert_close(out[i : i + 1, keep], want, **CLOSE)


def test_a_text_mask_of_all_valid_is_none() -> None:
    q, k, v = video_like(5, 2, ODD.sequence, 2, 8)
    mask = torch.ones(2, ODD.text, dtype=torch.bool)
    assert torch.equal(
        rectified_attention(q, k, v, ODD, config_of("row"), text_mask=mask),
        rectified_attention(q, k, v, ODD, config_of("row")),
    )
