"""The attention maps of one head block by block, their differences, and what becomes of every block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...config import SparseConfig
from ..calls.maps import KINDS, HeadResult, HeadStudy
from .styles import INK, YELLOW, is_ours, label

KIND_COLOURS = dict(zip(KINDS, (INK, YELLOW, "#DDDDDD"), strict=True))
_DPI = 110
_NOTE = (
    "Rows: blocks of queries, columns: blocks of keys. A map shows how the output weighs the values of every block, "
    "mean over the queries of a block; rows sum to 1.\nBelow: red where a block gets more than in the map after the "
    "minus, blue where less; pale is within a tenth of an even share."
)
_SORTED = "\nBlocks are sorted by content: tokens that attend alike, wherever they lie in the video."


def maps_figure(path: Path, study: HeadStudy, sparsity: float, rectify: str) -> None:
    """Maps of full, plain sparse and rectified attention, their differences, the estimate and the fate of every block.

    rectify: the mode that is shown beside "none". Raises KeyError where the study has not both at `sparsity`.
    """
    full, none, rectified = study.full, study.results[sparsity, "none"], study.results[sparsity, rectify]
    shares, by_content = study.shares(rectified), study.blocks.by_content
    block, order = "block, sorted by content" if by_content else "block", study.order
    plain, shown = label("none", order), label(rectify, order)
    above = {
        "full:\nexact mass of every block": full,
        _title(plain, none): none.masses,
        _title(shown, rectified): rectified.masses,
    }
    below = {
        f"{plain} − full": none.masses - full,
        f"{shown} − full": rectified.masses - full,
        f"{shown} − {plain}": rectified.masses - none.masses,
    }
    high = float(full.max())  # a log scale of two decades at least
    masses = LogNorm(min(high / 100, max(1e-5, float(full[full > 0].quantile(0.02)))), high)
    most = max(float(each.abs().max()) for each in below.values()) or 1.0
    even = 1 / full.shape[1]  # what every column would hold if all were alike
    differences = SymLogNorm(linthresh=min(even / 10, most / 2), vmin=-most, vmax=most)

    figure = Figure(figsize=(17, 10), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.1)
    grid = figure.add_gridspec(3, 5, width_ratios=(1, 1, 1, 0.05, 1), height_ratios=(1, 1, 0.16))
    labels = ("attention mass (log scale; white: none)", "difference of masses (linear near 0, then log)")
    for row, (maps, norm) in enumerate(((above, masses), (below, differences))):
        for column, (title, values) in enumerate(maps.items()):
            image = _draw(figure.add_subplot(grid[row, column]), values, title, norm, block)
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[row, 3]), label=labels[row])
    bar.ax.minorticks_off()
    estimate = f"Estimate P from block means:\ncorrelation with the exact masses {shares['correlation']:.2f}"
    _draw(figure.add_subplot(grid[0, 4]), rectified.probability, estimate, masses, block)
    fate, colours = figure.add_subplot(grid[1, 4]), ListedColormap(list(KIND_COLOURS.values()))
    _show(fate, rectified.kinds(), "What becomes of every block", block, cmap=colours, vmin=0, vmax=2)

    legend, note = figure.add_subplot(grid[2, 4]), figure.add_subplot(grid[2, :4])
    for axis in (legend, note):
        axis.axis("off")
    patches = []
    for kind, colour in KIND_COLOURS.items():
        words = f"{kind}: {shares[f'{kind}_blocks']:.0%} of the blocks, {shares[f'{kind}_mass']:.0%} of the mass"
        patches.append(Patch(color=colour, label=words))
    legend.legend(handles=patches, loc="center", frameon=False, fontsize=10)
    note.text(0.0, 0.5, _NOTE + _SORTED * by_content, fontsize=10, va="center", transform=note.transAxes)
    figure.suptitle(
        f"At {sparsity:.4g} sparsity {none.misplaced:.0%} of the attention mass lies on the wrong blocks with {plain}, "
        f"{rectified.misplaced:.0%} with {shown} ({study.call})",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=_DPI)


def told(study: HeadStudy, config: SparseConfig) -> list[dict[str, Any]]:
    """The scores of every result with what it is called, in the order of the study. config: what they share."""
    rows = []
    for each in study.results.values():
        mode = config.replace(rectify=each.rectify, sparsity=each.sparsity)
        name = label(each.rectify, config.order, each.sparsity)
        rows.append({"attention": name, "ours": is_ours(mode), **each.scores()})
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], rectify: str) -> str:
    """One mode beside plain sparse at the highest sparsity, in a sentence. rows: those of `told`."""
    worst = max(row["sparsity"] for row in rows)
    mine, plain = (
        next(row for row in rows if (row["sparsity"], row["rectify"]) == (worst, mode)) for mode in (rectify, "none")
    )
    return (
        f"{mine['attention']}: {mine['density']:.1%} of the query-key pairs, so at most "
        f"{1 / mine['density']:.1f} times as fast; output error {mine['relative_error']:.3f} where "
        f"{plain['attention']} has {plain['relative_error']:.3f}."
    )


def _title(name: str, result: HeadResult) -> str:
    return f"{name}:\noutput error {result.relative_error:.3f}, {result.misplaced:.0%} of the mass misplaced"


def _draw(axis: Axes, masses: torch.Tensor, title: str, norm: Normalize, block: str) -> Any:
    """[nb, nb + 1] as an image, with the isolated column set apart and drawn wider. White: no mass."""
    blocks = masses[:, :-1]
    side = max(2, blocks.shape[1] // 20)
    gap = torch.full((len(blocks), max(1, side // 2)), float("nan"))
    drawn = torch.cat([blocks, gap, masses[:, -1:].expand(-1, side)], dim=1)
    cmap = "RdBu_r" if isinstance(norm, SymLogNorm) else "cividis"
    image = _show(axis, drawn, title, f"{block}   (set apart: isolated tokens)", cmap=cmap, norm=norm)
    axis.set_ylabel(f"query {block}", fontsize=9)
    axis.set_facecolor("white")
    return image


def _show(axis: Axes, values: torch.Tensor, title: str, block: str, **colours: Any) -> Any:
    # one block is one pixel of an image: sharp where blocks are few, averaged where they are smaller than the screen's
    image = axis.imshow(values.numpy(), interpolation="antialiased", interpolation_stage="rgba", **colours)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(f"key {block}", fontsize=9)
    axis.set_ylabel(f"query {block}", fontsize=9)
    axis.tick_params(labelsize=8)
    return image
