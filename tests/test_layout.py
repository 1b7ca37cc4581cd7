import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import holds_frame_0, membership, touching
from rectified_spaattn import TokenLayout

layouts = st.builds(
    TokenLayout.build,
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    text=st.sampled_from((0, 1, 5, 33)),
    text_first=st.booleans(),
    block_size=st.sampled_from((16, 32, 64)),
    order=st.sampled_from(("gilbert", "tile", "raster")),
)


@given(layout=layouts)
def test_order_and_inverse_undo_each_other(layout: TokenLayout) -> None:
    video = torch.arange(math.prod(layout.grid))
    assert layout.order.dtype == layout.inverse.dtype == torch.int64
    assert torch.equal(layout.order[layout.inverse], video)
    assert torch.equal(layout.inverse[layout.order], video)


@given(layout=layouts)
def test_every_token_is_tiled_or_isolated(layout: TokenLayout) -> None:
    video, b = math.prod(layout.grid), layout.block_size
    assert layout.num_blocks == video // b
    assert len(layout.tiled) == video // b * b
    assert layout.leftover == video % b
    assert layout.sequence == video + layout.text
    everything = torch.cat([layout.tiled, layout.isolated])
    assert torch.equal(everything.sort().values, torch.arange(layout.sequence))


@given(layout=layouts)
def test_blocks_follow_the_curve_and_text_stands_where_it_stands(layout: TokenLayout) -> None:
    video, start = math.prod(layout.grid), layout.text if layout.text_first else 0
    blocks = layout.tiled.view(-1, layout.block_size)
    member = membership(layout)
    for n, places in enumerate(blocks):
        assert torch.equal(places - start, layout.order[n * layout.block_size : (n + 1) * layout.block_size])
        assert (member[places, n] == 1).all()
    left, text = layout.isolated[: layout.leftover], layout.isolated[layout.leftover :]
    assert ((left >= start) & (left < start + video)).all()
    first = 0 if layout.text_first else video
    assert text.tolist() == list(range(first, first + layout.text))


@given(layout=layouts)
def test_neighbours_are_those_of_brute_force(layout: TokenLayout) -> None:
    assert layout.neighbours.dtype == torch.bool
    assert torch.equal(layout.neighbours, touching(layout))


@given(layout=layouts)
def test_first_frame_blocks_are_those_of_brute_force(layout: TokenLayout) -> None:
    assert torch.equal(layout.first_frame, holds_frame_0(layout))


def test_neighbours_touch_at_corners_and_through_time() -> None:
    # 2 x 2 x 2 boxes of 4 x 4 x 4 tokens: all touch in the middle; 3 boxes a side: only the middle one touches all 27
    assert TokenLayout.build((8, 8, 8), block_size=64, order="tile").neighbours.all()
    counts = TokenLayout.build((12, 12, 12), block_size=64, order="tile").neighbours.sum(1)
    assert sorted(counts.tolist()) == [8] * 8 + [12] * 12 + [18] * 6 + [27]


def test_raster_neighbours_by_hand() -> None:
    # one row of 16 tokens a block: a block touches the row above, the row below and itself
    layout = TokenLayout.build((1, 4, 16), block_size=16, order="raster")
    assert layout.neighbours.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert layout.first_frame.tolist() == [True] * 4
    two_frames = TokenLayout.build((2, 2, 16), block_size=16, order="raster")
    assert two_frames.first_frame.tolist() == [True, True, False, False]


def test_a_block_that_begins_in_frame_0_counts_as_first_frame() -> None:
    layout = TokenLayout.build((3, 3, 8), block_size=16, order="raster")  # 24 tokens a frame
    assert layout.first_frame.tolist() == [True, True, False, False]
    one_token = TokenLayout.build((3, 1, 17), block_size=16, order="raster")  # the second block holds its last token
    assert one_token.first_frame.tolist() == [True, True, False]


def test_a_grid_below_one_block_is_all_isolated() -> None:
    layout = TokenLayout.build((1, 3, 5), text=2, text_first=True, block_size=16)
    assert layout.num_blocks == 0
    assert layout.neighbours.shape == (0, 0)
    assert sorted(layout.isolated[:15].tolist()) == list(range(2, 17))
    assert layout.isolated[15:].tolist() == [0, 1]


def test_layouts_are_cached_by_their_arguments() -> None:
    arguments: dict[str, Any] = {"grid": (2, 5, 7), "text": 3, "text_first": True, "block_size": 32, "order": "tile"}
    layout = TokenLayout.build(**arguments)
    assert TokenLayout.build(**arguments) is layout
    assert TokenLayout.build(**{**arguments, "grid": [2, 5, 7]}) is layout
    others = {"grid": (5, 2, 7), "text": 4, "text_first": False, "block_size": 16, "order": "gilbert"}
    for name, value in others.items():
        assert TokenLayout.build(**{**arguments, name: value}) is not layout
        assert getattr(TokenLayout.build(**{**arguments, name: value}), "curve" if name == "order" else name) == value


def test_defaults_are_the_papers() -> None:
    layout = TokenLayout.build((2, 3, 4))
    assert (layout.text, layout.text_first, layout.block_size, layout.curve) == (0, False, 128, "gilbert")


def test_a_layout_is_on_the_cpu_whatever_the_default_device() -> None:
    """It is cached: one built inside `with torch.device(...)` serves every later call."""
    with torch.device("meta"):
        layout = TokenLayout.build((3, 4, 6), text=7, block_size=16, order="tile")
    for name in ("order", "inverse", "neighbours", "first_frame", "tiled", "isolated"):
        assert getattr(layout, name).device.type == "cpu", name


def test_on_another_device_is_the_same_layout_and_cached() -> None:
    layout = TokenLayout.build((2, 4, 8), text=3, block_size=16)
    assert layout.on(torch.device("cpu")) is layout
    moved = layout.on(torch.device("meta"))
    assert moved is layout.on(torch.device("meta"))
    assert (moved.grid, moved.text, moved.num_blocks) == (layout.grid, layout.text, layout.num_blocks)
    assert moved.order.device.type == moved.neighbours.device.type == moved.isolated.device.type == "meta"


def test_a_layout_cannot_be_changed() -> None:
    layout = TokenLayout.build((2, 4, 8), block_size=16)
    with pytest.raises(AttributeError):
        layout.text = 5  # type: ignore[misc]
