"""Which tokens can be tiled: any places of a sequence, and a grid with some of its tokens left out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import MODES, Call, video_like
from oracle import dense, holds_frame_0, membership, oracle, sdpa, touching
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.orders import blocks_of
from sorted_oracle import oracle_by_head

GRID = (3, 6, 9)  # 162 tokens
BACKENDS = ("torch", "reference")


@st.composite
def place_sets(draw: Any) -> tuple[int, list[int]]:
    """The length of a sequence, and any of its places: none, all, runs or strewn ones."""
    sequence, seed = draw(st.integers(1, 150)), draw(st.integers(0, 2**20))
    share = draw(st.sampled_from((0.0, 0.3, 0.8, 1.0)))
    strewn = torch.rand(sequence, generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        strewn = strewn.repeat_interleave(13)[:sequence]
    return sequence, (strewn < share).nonzero().flatten().tolist()


def config_of(mode: str, order: str = "content", **settings: Any) -> SparseConfig:
    options = {"sparsity": 0.6, "top_p": 0.2, "block_size": 16, **settings}
    return SparseConfig(rectify=mode, order=order, **options)  # type: ignore[arg-type]


def check(call: Call, backend: str) -> None:
    """The operator is the oracle, on the order that it reports."""
    out, stats = rectified_attention(*call.arguments, **call.options, backend=backend, return_stats=True)
    if stats.token_order is None:
        want = oracle(*call.arguments, **call.options, block_mask=stats.block_mask, compensated=stats.compensated).out
    else:
        assert torch.equal(
            stats.token_order.sort(-1).values, call.blocks.tiled.sort().values.expand_as(stats.token_order)
        )
        want = oracle_by_head(call, stats.token_order, stats.block_mask, stats.compensated).out
    assert (out.double() - want).abs().max() <= (1e-10 if backend == "reference" else 1e-4 * want.abs().max())


@given(chosen=place_sets())
def test_any_places(chosen: tuple[int, list[int]]) -> None:
    sequence, places = chosen
    layout = TokenLayout.of(sequence, torch.tensor(places, dtype=torch.int64))
    assert layout.video_places.tolist() == places
    assert layout.text_places.tolist() == sorted(set(range(sequence)) - set(places))
    assert (layout.video, layout.text) == (len(places), sequence - len(places))
    assert layout.grid is None
    assert TokenLayout.of(sequence, layout.spans) == layout == TokenLayout.from_key(layout.key)
    assert TokenLayout.of(sequence=sequence, tiled=[(place, place + 1) for place in reversed(places)]) == layout
    assert TokenLayout.build((1, 1, sequence)).without(layout.text_places.tolist()).spans == layout.spans
    blocks = blocks_of(layout, config_of("row"))
    assert blocks.tiled.tolist() == places[: len(places) // 16 * 16]
    assert sorted([*blocks.tiled.tolist(), *blocks.isolated.tolist()]) == list(range(sequence))
    assert blocks.leftover == len(places) % 16
    assert blocks.neighbours.numel() == blocks.first_frame.numel() == 0


@settings(max_examples=60)
@given(
    chosen=place_sets(),
    mode=st.sampled_from(MODES),
    backend=st.sampled_from(BACKENDS),
    kept=st.sampled_from((None, 0.6)),
    seed=st.integers(0, 99),
)
def test_tokens_in_no_grid(
    chosen: tuple[int, list[int]], mode: str, backend: str, kept: float | None, seed: int
) -> None:
    sequence, places = chosen
    layout = TokenLayout.of(sequence, torch.tensor(places, dtype=torch.int64))
    options = {}
    if kept is not None:
        mask = torch.rand(2, layout.text, generator=torch.Generator().manual_seed(seed)) < kept
        if len(places) < 16 and layout.text:  # something must be left to attend to
            mask[:, 0] = True
        options = {"text_mask": mask}
    check(Call(layout, config_of(mode), video_like(seed, 2, sequence, 2, 8), options), backend)


@pytest.mark.parametrize("mode", MODES)
def test_where_the_tokens_stand_does_not_matter(mode: str) -> None:
    """The same tokens, moved together to the front, in the same order."""
    strewn = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.7
    layout = TokenLayout.of(200, strewn.nonzero())
    together = TokenLayout.of(200, [(0, layout.video)])
    move = torch.cat([layout.video_places, layout.text_places])
    qkv = video_like(1, 2, 200, 2, 8)
    got = rectified_attention(*qkv, layout, config_of(mode))
    want = rectified_attention(*(x[:, move] for x in qkv), together, config_of(mode))
    assert torch.equal(got[:, move], want)


@pytest.mark.parametrize("order", ["content", "gilbert", "tile", "raster"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text_first", [False, True])
def test_hidden_tokens(mode: str, order: str, text_first: bool) -> None:
    """They stand alone where they are, in the text mask too; the grid and what lies where in it stay."""
    whole = TokenLayout.build(GRID, text=5, text_first=text_first)
    hidden = [whole.grid_start + i for i in (*range(30, 47), 60, 161)]
    layout = whole.without(hidden)
    assert (layout.grid, layout.grid_start) == (whole.grid, whole.grid_start)
    assert (layout.video, layout.text) == (162 - 19, 5 + 19)
    assert layout.text_places.tolist() == sorted([*whole.text_places.tolist(), *hidden])
    assert layout.without([]) == layout
    assert whole.without(hidden[:3]).without(hidden[3:]) == layout
    mask = torch.isin(layout.text_places, torch.tensor(hidden), invert=True).repeat(2, 1)
    config = config_of(mode, order)
    for options in ({"text_mask": mask}, {}):
        qkv = video_like(2, 2, layout.sequence, 2, 8)
        check(Call(layout, config, qkv, options), "reference")
        check(Call(layout, config, qkv, options), "torch")
    q, k, v = video_like(2, 2, layout.sequence, 2, 8)
    clean = rectified_attention(q, k, v, layout, config, text_mask=mask)
    shown = torch.tensor(sorted({*range(layout.sequence)} - {*hidden}))
    for x in (q, k, v):
        x[:, hidden] = torch.nan
    assert torch.equal(rectified_attention(q, k, v, layout, config, text_mask=mask)[:, shown], clean[:, shown])


@pytest.mark.parametrize("order", ["gilbert", "tile", "raster"])
def test_blocks_around_hidden_tokens(order: str) -> None:
    layout = TokenLayout.build(GRID, text=5, text_first=True).without([5, *range(25, 60), 166])
    config = config_of("ipar", order, neighbours=True, first_frame=True)
    blocks = blocks_of(layout, config)
    assert (blocks.num_blocks, blocks.leftover) == (7, 13)
    member = membership(layout, config)
    for n, places in enumerate(blocks.tiled.view(7, 16)):
        assert member[places, n].all()
    assert torch.equal(blocks.neighbours, touching(layout, config))
    assert torch.equal(blocks.first_frame, holds_frame_0(layout, config))
    check(Call(layout, config, video_like(3, 1, layout.sequence, 2, 8)), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_must_be_exact_stand_alone(backend: str) -> None:
    """Valid ones attend to everything and are attended to by all, however sparse the rest is."""
    exact = list(range(40, 58))
    layout = TokenLayout.build(GRID).without(exact)
    qkv = video_like(4, 1, layout.sequence, 2, 8)
    out = rectified_attention(*qkv, layout, config_of("none", sparsity=0.95, top_p=0.0), backend=backend)
    torch.testing.assert_close(out[:, exact].double(), dense(*qkv)[:, exact], rtol=2e-5, atol=2e-6)


def test_without_any_token_left_it_is_full_attention() -> None:
    layout = TokenLayout.build(GRID, text=5).without(range(162))
    assert (layout.video, layout.text, layout.spans) == (0, 167, ())
    qkv = video_like(5, 1, layout.sequence, 2, 8)
    for order in ("content", "gilbert"):
        out = rectified_attention(*qkv, layout, config_of("row", order))
        torch.testing.assert_close(out, sdpa(*qkv), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tiled", [[(-1, 5)], [(3, 11)], torch.tensor([10]), torch.tensor([-1, 2])])
def test_places_outside_the_sequence_are_refused(tiled: Any) -> None:
    with pytest.raises(ValueError, match=r"spans: got .*allowed: half-open.*within places 0 to 10"):
        TokenLayout.of(10, tiled)


@pytest.mark.parametrize("order", ["gilbert", "tile", "raster"])
def test_an_order_in_space_needs_a_grid(order: str) -> None:
    layout = TokenLayout.of(40, [(0, 32)])
    with pytest.raises(ValueError, match=f"order: got '{order}' for tokens that lie in no grid; allowed: 'content'"):
        rectified_attention(*video_like(6, 1, 40, 1, 8), layout, config_of("row", order))
