"""Tokens that attend to each other only, in causal order or not, while all others attend to everything."""

import math

import pytest
import torch

import rectified_spaattn as rsa
from cases import MODES, Tensors, kernel_budget, video_like
from oracle import dense
from rectified_spaattn import SparseConfig, TokenLayout, ops, rectified_attention
from rectified_spaattn.backends.triton.plan import decide
from rectified_spaattn.backends.triton.tile import tile
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.orders import blocks_of
from test_kernels import EXACT

SEES = ("text", "causal text")
GRID, TEXT = (3, 8, 11), 75  # 4 blocks of 64 and 8 leftover tokens
VALID = torch.rand(2, TEXT, generator=torch.Generator().manual_seed(0)) < 0.7
VALID[1, :40] = False  # the first of the text see nothing where it is causal
SMALL = SparseConfig(block_size=64, sparsity=0.6, top_p=0.2, order="gilbert")


def layout_of(sees: str, text_first: bool = True) -> TokenLayout:
    return TokenLayout.build(GRID, TEXT, text_first, text_sees=sees)  # type: ignore[arg-type]


def inputs(dtype: torch.dtype = torch.float32, heads: int = 4, head_dim: int = 16, batch: int = 2) -> Tensors:
    return video_like(0, batch, math.prod(GRID) + TEXT, heads, head_dim, dtype, key_heads=heads // 2)


def seen(layout: TokenLayout, valid: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, S, S]: what full attention of such a model lets each query see."""
    keys = torch.ones(len(valid), layout.sequence, dtype=torch.bool)
    keys[:, layout.text_places] = valid
    text = torch.zeros(layout.sequence, dtype=torch.bool)
    text[layout.text_places] = True
    sees = keys[:, None].repeat(1, layout.sequence, 1)
    among = text.expand(layout.sequence, -1)
    sees[:, text] &= (among.tril() if layout.causal else among)[text]
    return sees[:, None]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("sees", SEES)
def test_with_all_blocks_kept_it_is_masked_full_attention(
    sees: str, text_first: bool, order: str, backend: str
) -> None:
    layout, qkv = layout_of(sees, text_first), inputs()
    config = SMALL.replace(sparsity=0.0, order=order)
    out, stats = rectified_attention(*qkv, layout, config, text_mask=VALID, backend=backend, return_stats=True)
    want = dense(*qkv, sees=seen(layout, VALID)).nan_to_num(0.0)  # zeros where a query sees nothing
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-6)
    assert stats.density == 1


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sees", SEES)
def test_the_others_are_as_they_were(sees: str, mode: str, backend: str) -> None:
    """Leftover tokens are isolated, too, and attend to all."""
    qkv, config = inputs(), SMALL.replace(rectify=mode)
    layout = layout_of(sees)
    want, whole = rectified_attention(
        *qkv, layout_of("all"), config, text_mask=VALID, backend=backend, return_stats=True
    )
    out, stats = rectified_attention(*qkv, layout, config, text_mask=VALID, backend=backend, return_stats=True)
    video = layout.video_places
    torch.testing.assert_close(out[:, video], want[:, video], rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.block_mask, whole.block_mask)
    text = layout.text_places
    masked = dense(*qkv, sees=seen(layout, VALID)).nan_to_num(0.0)
    torch.testing.assert_close(out[:, text].double(), masked[:, text], rtol=2e-5, atol=2e-6)
    assert (out[:, text] - want[:, text]).abs().max() > 0.05


@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("sees", SEES)
def test_density_counts_pairs(sees: str, valid: torch.Tensor | None) -> None:
    layout, qkv = layout_of(sees), inputs()
    _, stats = rectified_attention(*qkv, layout, SMALL, text_mask=valid, return_stats=True)
    blocks, every = blocks_of(layout, SMALL), seen(layout, torch.ones_like(VALID) if valid is None else valid)[:, 0]
    kept = stats.block_mask.repeat_interleave(64, 2).repeat_interleave(64, 3)  # [B, H, nb * b, nb * b]
    whole = every.sum((1, 2)).double()
    saved = 1 - SMALL.rule.tail / 64  # a dropped block is one key to every query where there is a tail
    computed = whole - saved * (~kept).sum((2, 3)).double().mean(1)
    assert stats.density == pytest.approx((computed / whole).mean().item(), rel=1e-6)
    assert len(blocks.tiled) == kept.shape[2]


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sees", SEES)
def test_what_padded_text_holds_changes_nothing(sees: str, backend: str, filler: float) -> None:
    layout, (q, k, v) = layout_of(sees), inputs()
    padding = torch.zeros(2, layout.sequence, dtype=torch.bool)
    padding[:, layout.text_places] = ~VALID
    want = rectified_attention(q, k, v, layout, SMALL, text_mask=VALID, backend=backend)
    assert want.isfinite().all()
    dirty = [x.masked_fill(padding[..., None, None], filler) for x in (k, v)]
    assert torch.equal(rectified_attention(q, *dirty, layout, SMALL, text_mask=VALID, backend=backend), want)


def test_a_text_of_which_nothing_is_valid_gets_zeros() -> None:
    layout, qkv = layout_of("text"), inputs()
    out = rectified_attention(*qkv, layout, SMALL, text_mask=torch.zeros(2, TEXT, dtype=torch.bool))
    assert (out[:, layout.text_places] == 0).all()
    assert (out[:, layout.video_places] != 0).all()


def test_a_plan_keeps_what_text_sees() -> None:
    layout, qkv = layout_of("causal text"), inputs()
    plan = rsa.plan(*qkv, layout, SMALL, text_mask=VALID)
    assert torch.equal(rsa.attend(*qkv, plan), rectified_attention(*qkv, layout, SMALL, text_mask=VALID))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_opcheck(backend: str) -> None:
    layout = layout_of("causal text")
    torch.library.opcheck(ops.attention, (*inputs(), VALID, None, None, None, layout.key, SMALL.key, 0.3, backend))


def test_other_tokens_that_stand_alone_attend_to_all() -> None:
    """Text, sound and video, of which the text alone is apart."""
    layout = TokenLayout(sequence=20 + 12 + 128, spans=((32, 160),), apart=((0, 20),), causal=True)
    q, k, v = video_like(3, 1, layout.sequence, 2, 8)
    config = SparseConfig(block_size=32, sparsity=0)
    out = rectified_attention(q, k, v, layout, config)
    torch.testing.assert_close(out[:, 20:].double(), dense(q, k, v)[:, 20:], rtol=2e-5, atol=2e-6)
    text = [x[:, :20] for x in (q, k, v)]
    causal = dense(*text, sees=torch.ones(20, 20, dtype=torch.bool).tril())
    torch.testing.assert_close(out[:, :20].double(), causal, rtol=2e-5, atol=2e-6)


def test_a_layout_tells_them() -> None:
    layout = layout_of("causal text", text_first=False)
    assert layout.apart == ((264, 264 + TEXT),)
    assert layout == TokenLayout.from_key(layout.key)
    assert layout.key not in {layout_of("text", False).key, layout_of("all", False).key}
    assert "75 of them attend causally to each other only" in str(layout)
    assert layout.without([3, 4]).apart == layout.apart
    assert layout.padded(TEXT - 36).apart == ((264, 300),)
    assert (layout.padded(TEXT).text, layout.padded(TEXT).apart) == (0, ())
    assert TokenLayout.build(GRID, 0, text_sees="text") == TokenLayout.build(GRID)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apart": ((0, 9),)}, r"apart: got \(\(0, 9\),\), of which 1 can be tiled; allowed: tokens that stand alone"),
        ({"apart": ((3, 3),)}, r"apart: got \(\(3, 3\),\); allowed: half-open"),
        ({"apart": ((70, 81),)}, r"apart: got .*; allowed: .* within places 0 to 80"),
    ],
)
def test_what_cannot_be_apart(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(sequence=80, spans=((8, 72),), **fields)  # type: ignore[arg-type]


def test_words_that_text_sees_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"text_sees: got 'video'; allowed: one of \['all', 'text', 'causal text'\]"):
        layout_of("video")


@pytest.mark.parametrize(("sees", "mode"), [("text", "ipar+gapr"), ("causal text", "row")])
def test_kernels(sees: str, mode: str) -> None:
    layout, qkv = layout_of(sees), inputs(EXACT, heads=2, head_dim=64, batch=1)
    config, valid = SMALL.replace(rectify=mode), VALID[:1]
    blocks = blocks_of(layout, config)  # rows: 256 tiled, 8 leftover and 75 of text, and 45 that are none
    assert blocks.idle is not None
    assert blocks.idle.tolist() == [False] * 5 + [True]
    given = Inputs(*qkv, blocks, config, valid, 0.125)
    _, _, lists = decide(given, tile(given))
    assert lists.counts[..., 4].eq(4).all()
    assert not lists.counts[..., 5].any()
    out, stats = rectified_attention(*qkv, layout, config, text_mask=valid, backend="triton", return_stats=True)
    options = {"block_mask": stats.block_mask, "text_mask": valid, "backend": "reference", "return_stats": True}
    want, exact = rectified_attention(*qkv, layout, config, **options)
    assert stats.density == exact.density
    assert (out.double() - want).abs().max() <= kernel_budget(qkv, layout, valid) * want.abs().max()
