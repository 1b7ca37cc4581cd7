"""The picture of curves on the demo's page, which the package carries.

python -m studies.curve_figure docs/images/curve.png
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image

from rectified_spaattn.lab.pages.styles import BLUE, PALETTE
from rectified_spaattn.layout import Grid
from rectified_spaattn.orders import CURVES

_DPI = 130


def curve_figure(path: Path, grid: Grid = (8, 8, 8), block_size: int = 64) -> dict[str, float]:
    """Raster order and Gilbert curve through a small grid, blocks coloured, one block drawn solid.

    Returns the mean distance between two tokens of a block under each order, in tokens.
    """
    figure = Figure(figsize=(9, 5))
    figure.subplots_adjust(left=0.01, right=0.95, bottom=0.02, top=0.86, wspace=0.14)
    spread = {}
    names = {"raster": "Raster order", "gilbert": "Gilbert curve"}
    for place, (order, name) in enumerate(names.items(), start=1):
        spread[order] = mean_distance(grid, block_size, order)
        axes: Any = figure.add_subplot(1, 2, place, projection="3d")
        _draw_curve(axes, grid, block_size, order)
        axes.set_title(f"{name}: two tokens of a block are\n{spread[order]:.2f} tokens apart on average", fontsize=10)
    figure.suptitle(
        f"{block_size} consecutive tokens: {_shape_of(grid, block_size, 'raster')} in raster order, "
        f"{_shape_of(grid, block_size, 'gilbert')} on the Gilbert curve",
        fontsize=11,
        fontweight="bold",
    )
    figure.savefig(path, dpi=_DPI)
    return spread


def mean_distance(grid: Grid, block_size: int, order: str) -> float:
    """Mean Euclidean distance between two tokens of the same block, over all whole blocks, in tokens."""
    points = _points(grid, block_size, order)
    blocks = points[: len(points) // block_size * block_size].view(-1, block_size, 3)
    pairs = block_size * (block_size - 1)
    return (torch.cdist(blocks, blocks).sum((1, 2)) / pairs).mean().item()


def _points(grid: Grid, block_size: int, order: str) -> torch.Tensor:
    """float [N, 3]: (t, h, w) of every token along the curve."""
    _, h, w = grid
    curve = torch.tensor(CURVES[order](grid, block_size))
    return torch.stack([curve // (h * w), curve // w % h, curve % w], dim=1).float()


def _draw_curve(axes: Any, grid: Grid, block_size: int, order: str) -> None:
    t, y, x = _points(grid, block_size, order).numpy().T
    for block in range(len(t) // block_size):
        # one more: the step into the next block
        span = slice(block * block_size, (block + 1) * block_size + 1)
        colour = PALETTE[block % len(PALETTE)]
        axes.plot(t[span], x[span], -y[span], color=colour, linewidth=1.6, alpha=0.9)
    t_side, y_side, x_side = grid
    filled = np.zeros((t_side, x_side, y_side), dtype=bool)
    solid = slice(0, block_size)
    filled[t[solid].astype(int), x[solid].astype(int), (y_side - 1 - y[solid]).astype(int)] = True
    corners = np.indices((t_side + 1, x_side + 1, y_side + 1)).astype(float)
    axes.voxels(
        corners[0] - 0.5,
        corners[1] - 0.5,
        corners[2] - y_side + 0.5,
        filled,
        facecolors=BLUE + "40",
        edgecolors="#FFFFFF60",
        shade=False,
    )
    axes.set(xlabel="time", ylabel="width", zlabel="height", xticks=[], yticks=[], zticks=[])
    axes.set_box_aspect((t_side, x_side, y_side), zoom=0.95)
    axes.view_init(elev=22, azim=-58)


def _shape_of(grid: Grid, block_size: int, order: str) -> str:
    """The bounding box of the first block in words."""
    points = _points(grid, block_size, order)[:block_size]
    t, h, w = (points.amax(0) - points.amin(0) + 1).int().tolist()
    return f"a {t} × {h} × {w} {'slice' if min(t, h, w) == 1 else 'patch'}"


def main(path: Path) -> None:
    """Draw it in few colours, as a small file."""
    curve_figure(path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
