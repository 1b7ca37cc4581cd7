import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import holds_frame_0, membership, touching
from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.orders import CURVES, blocks_of

layouts = st.builds(
    TokenLayout.build,
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    text=st.sampled_from((0, 1, 5, 33)),
    text_first=st.booleans(),
)
configs = st.builds(
    SparseConfig,
    block_size=st.sampled_from((16, 32, 64)),
    order=st.sampled_from(("gilbert", "tile", "raster")),
)


def in_space(block_size: int = 16, order: Any = "gilbert") -> SparseConfig:
    return SparseConfig(block_size=block_size, order=order)


@given(layout=layouts, config=configs)
def test_every_token_is_tiled_or_isolated(layout: TokenLayout, config: SparseConfig) -> None:
    blocks, video, b = blocks_of(layout, config), math.prod(layout.grid), config.block_size
    assert blocks.num_blocks == video // b
    assert len(blocks.tiled) == video // b * b
    assert blocks.leftover == video % b
    assert blocks.sequence == layout.sequence == video + layout.text
    everything = torch.cat([blocks.tiled, blocks.isolated])
    assert torch.equal(everything.sort().values, torch.arange(layout.sequence))


@given(layout=layouts, config=configs)
def test_blocks_follow_the_curve_and_text_stands_where_it_stands(layout: TokenLayout, config: SparseConfig) -> None:
    blocks, video, b = blocks_of(layout, config), math.prod(layout.grid), config.block_size
    start = layout.grid_start
    curve = torch.tensor(CURVES[config.order](layout.grid, b))
    member = membership(layout, config)
    for n, places in enumerate(blocks.tiled.view(-1, b)):
        assert torch.equal(places - start, curve[n * b : (n + 1) * b])
        assert (member[places, n] == 1).all()
    left, text = blocks.isolated[: blocks.leftover], blocks.isolated[blocks.leftover :]
    assert ((left >= start) & (left < start + video)).all()
    first = 0 if start else video
    assert text.tolist() == list(range(first, first + layout.text)) == layout.text_places.tolist()


@given(layout=layouts, config=configs)
def test_neighbours_and_first_frame_are_those_of_brute_force(layout: TokenLayout, config: SparseConfig) -> None:
    blocks = blocks_of(layout, config)
    assert blocks.neighbours.dtype == blocks.first_frame.dtype == torch.bool
    assert torch.equal(blocks.neighbours, touching(layout, config))
    assert torch.equal(blocks.first_frame, holds_frame_0(layout, config))


def test_neighbours_touch_at_corners_and_through_time() -> None:
    # 2 x 2 x 2 boxes of 4 x 4 x 4 tokens: all touch in the middle; 3 boxes a side: only the middle one touches all 27
    config = in_space(64, "tile")
    assert blocks_of(TokenLayout.build((8, 8, 8)), config).neighbours.all()
    counts = blocks_of(TokenLayout.build((12, 12, 12)), config).neighbours.sum(1)
    assert sorted(counts.tolist()) == [8] * 8 + [12] * 12 + [18] * 6 + [27]


def test_raster_neighbours_by_hand() -> None:
    # one row of 16 tokens a block: a block touches the row above, the row below and itself
    blocks = blocks_of(TokenLayout.build((1, 4, 16)), in_space(order="raster"))
    assert blocks.neighbours.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert blocks.first_frame.tolist() == [True] * 4
    two_frames = blocks_of(TokenLayout.build((2, 2, 16)), in_space(order="raster"))
    assert two_frames.first_frame.tolist() == [True, True, False, False]


def test_a_block_that_begins_in_frame_0_counts_as_first_frame() -> None:
    blocks = blocks_of(TokenLayout.build((3, 3, 8)), in_space(order="raster"))  # 24 tokens a frame
    assert blocks.first_frame.tolist() == [True, True, False, False]
    one_token = blocks_of(TokenLayout.build((3, 1, 17)), in_space(order="raster"))  # block 1 holds its last token
    assert one_token.first_frame.tolist() == [True, True, False]


def test_a_grid_below_one_block_is_all_isolated() -> None:
    blocks = blocks_of(TokenLayout.build((1, 3, 5), text=2, text_first=True), in_space())
    assert blocks.num_blocks == 0
    assert blocks.neighbours.shape == (0, 0)
    assert sorted(blocks.isolated[:15].tolist()) == list(range(2, 17))
    assert blocks.isolated[15:].tolist() == [0, 1]


def test_order_and_block_size_are_the_configs_whatever_the_layout() -> None:
    """The layout has neither: there is no second holder that could win."""
    layout = TokenLayout.build((4, 8, 8), text=3)
    assert not {"order", "block_size", "curve"} & set(dir(layout))
    for config in (SparseConfig(), SparseConfig(block_size=64), in_space(32), in_space(64, "tile")):
        blocks = blocks_of(layout, config)
        assert (blocks.block_size, blocks.by_content) == (config.block_size, config.order == "content")
        assert blocks.num_blocks == 256 // config.block_size


def test_blocks_are_cached_by_what_they_depend_on() -> None:
    layout, config = TokenLayout.build((2, 5, 7), text=3, text_first=True), in_space(32, "tile")
    blocks = blocks_of(layout, config)
    assert blocks_of(TokenLayout.build([2, 5, 7], 3, True), config.replace(sparsity=0.1, top_p=0)) is blocks
    for other in (TokenLayout.build((5, 2, 7), 3, True), TokenLayout.build((2, 5, 7), 4, True)):
        assert blocks_of(other, config) is not blocks
    for other in (in_space(16, "tile"), in_space(32, "gilbert")):
        assert blocks_of(layout, other) is not blocks


@given(layout=layouts)
def test_a_key_is_the_layout(layout: TokenLayout) -> None:
    assert TokenLayout.from_key(layout.key) == layout
    assert hash(TokenLayout.from_key(layout.key)) == hash(layout)


def test_blocks_are_on_the_cpu_whatever_the_default_device() -> None:
    """They are cached: some made inside `with torch.device(...)` serve every later call."""
    with torch.device("meta"):
        layout = TokenLayout.build((3, 4, 6), text=7)
        blocks = blocks_of(layout, in_space(order="tile"))
        assert layout.text_places.device.type == layout.video_places.device.type == "cpu"
    for name in ("neighbours", "first_frame", "tiled", "isolated", "places"):
        assert getattr(blocks, name).device.type == "cpu", name


def test_on_another_device_are_the_same_blocks_and_cached() -> None:
    blocks = blocks_of(TokenLayout.build((2, 4, 8), text=3), in_space())
    assert blocks.on(torch.device("cpu")) is blocks
    moved = blocks.on(torch.device("meta"))
    assert moved is blocks.on(torch.device("meta"))
    assert (moved.sequence, moved.text, moved.num_blocks) == (blocks.sequence, blocks.text, blocks.num_blocks)
    assert moved.tiled.device.type == moved.neighbours.device.type == moved.isolated.device.type == "meta"


def test_a_layout_cannot_be_changed() -> None:
    layout = TokenLayout.build((2, 4, 8))
    with pytest.raises(AttributeError):
        layout.sequence = 5  # type: ignore[misc]
