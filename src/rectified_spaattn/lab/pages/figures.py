"""The figures of the report. Titles are written from the numbers they are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...layout import Grid
from ...orders import CURVES

# Okabe and Ito's palette, which colour-blind readers can tell apart
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
MODE_COLOURS = {
    "none": VERMILION,
    "pooled": ORANGE,
    "ipar": SKY,
    "ipar+gapr": BLUE,
    "row": GREEN,
    "row+slope": PURPLE,
}
MODE_LABELS = {
    "none": "sparse, not rectified",
    "pooled": "pooled",
    "ipar": "IPAR",
    "ipar+gapr": "rectified (IPAR + GAPR)",
    "row": "row",
    "row+slope": "row + slope",
}
KIND_COLOURS = {"critical": BLUE, "compensated": YELLOW, "rejected": "#DDDDDD"}
# one block is one pixel of an image: sharp where blocks are few, averaged where they are smaller than the screen's
PIXELS: Mapping[str, Any] = {"interpolation": "antialiased", "interpolation_stage": "rgba"}
_DPI = 130


@dataclass(frozen=True, kw_only=True)
class CallName:
    """Which attention call a figure shows; layer, head and step counted from 0."""

    layer: int
    head: int
    step: int

    def __str__(self) -> str:
        return f"layer {self.layer}, head {self.head}, denoising step {self.step}"


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


def plan_figure(
    path: Path,
    full: torch.Tensor,
    probability: torch.Tensor,
    critical: torch.Tensor,
    compensated: torch.Tensor,
    call: CallName,
    sparsity: float,
) -> dict[str, float]:
    """Exact block masses, their estimate P, and what becomes of every block.

    full, probability: [nb, nb + 1], rows of sum 1; critical, compensated: bool [nb, nb]. Returns the share of blocks
    and of the exact attention mass that is critical, compensated and rejected, and the correlation of P with the truth.
    """
    rejected = ~critical & ~compensated
    found = {"correlation": torch.corrcoef(torch.stack([full.flatten(), probability.flatten()]))[0, 1].item()}
    for name, blocks in (("critical", critical), ("compensated", compensated), ("rejected", rejected)):
        found[f"{name}_blocks"] = blocks.float().mean().item()
        found[f"{name}_mass"] = (full[:, :-1] * blocks).sum(-1).mean().item()
    found["text_mass"] = full[:, -1].mean().item()

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.06))
    exact, estimated, plan = (figure.add_subplot(grid[0, column]) for column in range(3))
    norm = mass_norm(full)
    image = mass_map(exact, full, "Full attention:\nexact mass per block", norm)
    mass_map(estimated, probability, f"Estimate P from block means:\ncorrelation {found['correlation']:.2f}", norm)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, :2]), orientation="horizontal")
    bar.set_label("attention mass of a block (log scale)")
    kinds = torch.where(critical, 0, torch.where(compensated, 1, 2))
    kind_map(plan, kinds)
    plan.set(title="What becomes of every block", xlabel="key block", ylabel="query block")
    plan.title.set_fontsize(10)
    handles = [
        Patch(
            color=colour, label=f"{kind}: {found[f'{kind}_blocks']:.0%} of blocks, {found[f'{kind}_mass']:.0%} of mass"
        )
        for kind, colour in KIND_COLOURS.items()
    ]
    below = figure.add_subplot(grid[1, 2])
    below.axis("off")
    below.legend(handles=handles, loc="center", frameon=False, fontsize=9)
    figure.suptitle(
        f"At {sparsity:.0%} sparsity the critical blocks hold {found['critical_mass']:.0%} of the attention mass, "
        f"compensated ones {found['compensated_mass']:.0%} ({call})",
        fontsize=11,
        fontweight="bold",
    )
    figure.savefig(path, dpi=_DPI)
    return found


def error_figure(
    path: Path,
    errors: Mapping[float, Mapping[str, Sequence[float]]],
    masses: Mapping[str, tuple[torch.Tensor, float]],
    call: CallName,
    sparsity: float,
) -> None:
    """Output errors as bars, and where the attention mass goes as maps.

    errors: sparsity -> rectify mode -> relative output error of every layer. masses: title -> ([nb, nb + 1], the share
    of misplaced mass), full attention first, all for `call` at `sparsity`.
    """
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    top, bottom = parts
    _draw_errors(top.subplots(), errors)
    worst = max(errors)
    none, rectified = (float(np.mean(errors[worst][mode])) for mode in ("none", "ipar+gapr"))
    change = f"{1 - rectified / none:.0%} lower" if rectified < none else f"{rectified / none - 1:.0%} higher"
    top.suptitle(
        f"At {worst:.0%} sparsity the output error of an attention call is {change} with rectification",
        fontsize=11,
        fontweight="bold",
    )
    axes = bottom.subplots(1, len(masses))
    full = next(iter(masses.values()))[0]
    norm = mass_norm(full)
    for place, (axis, (title, (mass, wrong))) in enumerate(zip(axes, masses.items(), strict=True)):
        image = mass_map(axis, mass, title if place == 0 else f"{title}\n{wrong:.0%} of the mass misplaced", norm)
    bottom.colorbar(image, ax=list(axes), location="right", shrink=0.8, label="attention mass (log scale)")
    bottom.suptitle(
        f"Where the attention mass goes at {sparsity:.0%} sparsity ({call})", fontsize=11, fontweight="bold"
    )
    figure.savefig(path, dpi=_DPI)


def _draw_errors(axis: Axes, errors: Mapping[float, Mapping[str, Sequence[float]]]) -> None:
    modes = list(next(iter(errors.values())))
    width = 0.8 / len(modes)
    for place, mode in enumerate(modes):
        x = np.arange(len(errors)) + (place - (len(modes) - 1) / 2) * width
        means = [float(np.mean(by_mode[mode])) for by_mode in errors.values()]
        bars = axis.bar(x, means, width * 0.92, color=MODE_COLOURS[mode], label=MODE_LABELS[mode])
        labels = axis.bar_label(bars, labels=[f"{mean:.3f}" for mean in means], padding=3, fontsize=9)
        for label in labels:  # stays readable over the dots
            label.set(bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}, zorder=4)
        for left, by_mode in zip(x, errors.values(), strict=True):
            values = by_mode[mode]
            axis.scatter([left] * len(values), values, s=12, color="#222222", alpha=0.55, zorder=3, linewidths=0)
    axis.set_xticks(np.arange(len(errors)), [f"{sparsity:.0%} sparsity" for sparsity in errors])
    axis.set_ylabel("relative output error\n(bar: mean, dots: layers)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(modes), loc="upper left", fontsize=9)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.18)


def mass_norm(full: torch.Tensor) -> LogNorm:
    """A log scale over the masses of full attention, two decades at least."""
    high = float(full.max())
    return LogNorm(min(high / 100, max(1e-5, float(full[full > 0].quantile(0.02)))), high)


def mass_map(axis: Axes, masses: torch.Tensor, title: str, norm: Normalize, cmap: str = "cividis") -> Any:
    """[nb, nb + 1] as an image, with the isolated column set apart and drawn wider. White: no mass."""
    blocks = masses[:, :-1]
    side = max(2, blocks.shape[1] // 20)
    gap = torch.full((len(blocks), max(1, side // 2)), float("nan"))
    drawn = torch.cat([blocks, gap, masses[:, -1:].expand(-1, side)], dim=1)
    image = axis.imshow(drawn.numpy(), cmap=cmap, norm=norm, **PIXELS)
    axis.set_facecolor("white")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("key block                    (last: text)")
    axis.set_ylabel("query block")
    return image


def kind_map(axis: Axes, kinds: torch.Tensor) -> None:
    """[nb, nb] as an image in KIND_COLOURS: 0 for critical, 1 for compensated, 2 for rejected."""
    axis.imshow(kinds.numpy(), cmap=ListedColormap(list(KIND_COLOURS.values())), vmin=0, vmax=2, **PIXELS)


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
