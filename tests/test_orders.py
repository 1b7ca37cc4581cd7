import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectified_spaattn.orders import CURVES, gilbert, raster, tile

sides = st.integers(1, 13)
grids = st.tuples(sides, sides, sides)
Grid = tuple[int, int, int]


def coordinates(order: list[int], grid: Grid) -> torch.Tensor:
    """[N, 3]"""
    index = torch.tensor(order)
    return torch.stack([index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]], 1)


def extents(order: list[int], grid: Grid, b: int) -> torch.Tensor:
    """[blocks, 3], the bounding boxes of the whole blocks."""
    places = coordinates(order, grid)
    blocks = places[: len(places) // b * b].view(-1, b, 3)
    return blocks.amax(1) - blocks.amin(1) + 1


@given(grid=grids, order=st.sampled_from(sorted(CURVES)), block_size=st.sampled_from((16, 32, 48, 64, 128)))
def test_every_token_comes_exactly_once(grid: Grid, order: str, block_size: int) -> None:
    assert sorted(CURVES[order](grid, block_size)) == list(range(math.prod(grid)))


@given(grid=grids)
def test_gilbert_moves_to_a_neighbour_at_every_step(grid: Grid) -> None:
    places = coordinates(gilbert(grid, 128), grid)
    steps = (places[1:] - places[:-1]).abs()
    assert (steps.sum(1) >= 1).all()
    assert (steps.amax(1, keepdim=True) <= 1).all()
    if all(side % 2 == 0 for side in grid):
        assert (steps.sum(1) == 1).all()
    else:  # a few steps may cross a corner of a face, none the corner of a cube
        assert (steps.sum(1) <= 2).all()
        assert (steps.sum(1) == 2).sum() <= 1 + 0.2 * len(steps)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 9), (1, 7, 1), (5, 1, 1), (1, 16, 16), (32, 45, 80)])
def test_gilbert_of_thin_and_of_real_grids(grid: Grid) -> None:
    order = gilbert(grid, 128)
    assert sorted(order) == list(range(math.prod(grid)))
    steps = (coordinates(order, grid).diff(dim=0)).abs()
    assert (steps <= 1).all()


@pytest.mark.parametrize(
    ("grid", "b"), [((16, 24, 24), 64), ((16, 24, 24), 128), ((21, 45, 80), 128), ((1, 64, 64), 64)]
)
def test_gilbert_blocks_are_compact(grid: Grid, b: int) -> None:
    """The bounding box of a block is near a cube's (a square's for one frame): longest side and volume."""
    box = extents(gilbert(grid, b), grid, b).double()
    edge = b ** (1 / 2) if grid[0] == 1 else b ** (1 / 3)
    assert box.amax(1).mean() < 2 * edge
    assert box.prod(1).mean() < 2 * b
    assert box.amax(1).mean() < extents(raster(grid, b), grid, b).double().amax(1).mean() / 2


def test_raster_is_the_models_own_order() -> None:
    assert raster((2, 3, 4), 16) == list(range(24))


@pytest.mark.parametrize(
    ("grid", "b", "box"),
    [
        ((8, 8, 8), 64, (4, 4, 4)),
        ((1, 16, 16), 64, (1, 8, 8)),
        ((2, 16, 16), 64, (2, 4, 8)),
        ((9, 10, 11), 64, (4, 4, 4)),
        ((1, 3, 40), 16, (1, 2, 8)),
    ],
)
def test_tile_cuts_boxes(grid: Grid, b: int, box: Grid) -> None:
    """Equal boxes as near a cube as the grid allows, aligned to their own size."""
    order = tile(grid, b)
    whole = math.prod(side // length for side, length in zip(grid, box, strict=True))
    got = extents(order, grid, b)[:whole]
    assert len({tuple(sorted(row)) for row in got.tolist()} | {tuple(sorted(box))}) == 1
    assert (got.prod(1) == b).all()
    corners = coordinates(order, grid)[: whole * b].view(whole, b, 3).amin(1)
    assert (corners % got == 0).all()


def test_tile_leaves_the_rest_in_raster_order() -> None:
    order = tile((3, 5, 5), 16)
    rest = order[len(order) // 16 * 16 :]
    assert rest == sorted(rest)
    inside = (3 // 2) * (5 // 2) * (5 // 4)  # boxes of 2 x 2 x 4
    assert order[inside * 16 :] == sorted(order[inside * 16 :])


def test_tile_of_a_grid_that_holds_no_box_is_raster() -> None:
    assert tile((2, 2, 3), 16) == raster((2, 2, 3), 16)
    assert tile((1, 1, 17), 32) == raster((1, 1, 17), 32)
