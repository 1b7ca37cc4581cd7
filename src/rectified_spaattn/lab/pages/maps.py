"""The picture of `inspect`: the attention maps of one head block by block, their differences, and the plan."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..calls.maps import HeadResult, HeadStudy
from .figures import KIND_COLOURS, MODE_LABELS, CallName, kind_map, mass_map, mass_norm

_DPI = 110
_DIFFERENCE = "RdBu_r"
_NOTE = (
    "Rows: blocks of queries, columns: blocks of keys. A map shows how the output weighs the values of every block, "
    "mean over the queries of a block; rows sum to 1.\nBelow: red where a block gets more than in the map after the "
    "minus, blue where less; pale is within a tenth of an even share."
)
_SORTED = "\nBlocks are sorted by content: tokens that attend alike, wherever they lie in the video."


def maps_figure(path: Path, study: HeadStudy, sparsity: float, rectify: str, call: CallName) -> None:
    """Full, sparse and rectified maps above their differences, with the estimate and the fate of every block.

    rectify: the mode that is shown beside "none". Raises KeyError where the study has not both at `sparsity`.
    """
    none, rectified = study.result(sparsity, "none"), study.result(sparsity, rectify)
    shown = MODE_LABELS.get(rectify, rectify)
    figure = Figure(figsize=(17, 10), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.1)
    grid = figure.add_gridspec(3, 5, width_ratios=(1, 1, 1, 0.05, 1), height_ratios=(1, 1, 0.16))
    above = (
        (study.full, "Full attention:\nexact mass of every block"),
        (none.masses, _title("Sparse, not rectified", none)),
        (rectified.masses, _title(shown[0].upper() + shown[1:], rectified)),
    )
    by_content = study.blocks.by_content
    block = "block, sorted by content" if by_content else "block"
    norm = mass_norm(study.full)
    for column, (masses, title) in enumerate(above):
        image = _draw(figure.add_subplot(grid[0, column]), masses, title, norm, block)
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 3]), label="attention mass (log scale; white: none)")

    below = (
        (none.masses - study.full, "Sparse − full"),
        (rectified.masses - study.full, "Rectified − full"),
        (rectified.masses - none.masses, "Rectified − sparse"),
    )
    most = max(float(masses.abs().max()) for masses, _ in below) or 1.0
    even = 1 / study.full.shape[1]  # what every column would hold if all were alike
    differences = SymLogNorm(linthresh=min(even / 10, most / 2), vmin=-most, vmax=most)
    for column, (masses, title) in enumerate(below):
        image = _draw(figure.add_subplot(grid[1, column]), masses, title, differences, block, _DIFFERENCE)
    bar = figure.colorbar(
        image, cax=figure.add_subplot(grid[1, 3]), label="difference of masses (linear near 0, then log)"
    )
    bar.ax.minorticks_off()

    agreement = torch.corrcoef(torch.stack([study.full.flatten(), rectified.probability.flatten()]))[0, 1]
    estimate = f"Estimate P from block means:\ncorrelation with the exact masses {agreement:.2f}"
    _draw(figure.add_subplot(grid[0, 4]), rectified.probability, estimate, norm, block)
    handles = _draw_fate(figure.add_subplot(grid[1, 4]), study.full, rectified, block)
    legend, note = figure.add_subplot(grid[2, 4]), figure.add_subplot(grid[2, :4])
    legend.axis("off")
    legend.legend(handles=handles, loc="center", frameon=False, fontsize=10)
    note.axis("off")
    note.text(0.0, 0.5, _NOTE + _SORTED * by_content, fontsize=10, va="center", transform=note.transAxes)
    figure.suptitle(
        f"At {sparsity:.4g} sparsity {none.misplaced:.0%} of the attention mass lies on the wrong blocks without "
        f"rectification, {rectified.misplaced:.0%} with {rectify} ({call})",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=_DPI)


def _title(name: str, result: HeadResult) -> str:
    return f"{name}:\noutput error {result.relative_error:.3f}, {result.misplaced:.0%} of the mass misplaced"


def _draw(axis: Axes, masses: torch.Tensor, title: str, norm: Normalize, block: str, cmap: str = "cividis") -> Any:
    image = mass_map(axis, masses, title, norm, cmap)
    axis.set_xlabel(f"key {block}   (set apart: isolated tokens)", fontsize=9)
    axis.set_ylabel(f"query {block}", fontsize=9)
    axis.tick_params(labelsize=8)
    return image


def _draw_fate(axis: Axes, full: torch.Tensor, result: HeadResult, block: str) -> list[Patch]:
    """The categorical map; returns its legend."""
    kinds = result.kinds()
    kind_map(axis, kinds)
    axis.set_title("What becomes of every block", fontsize=10)
    axis.set_xlabel(f"key {block}", fontsize=9)
    axis.set_ylabel(f"query {block}", fontsize=9)
    axis.tick_params(labelsize=8)
    handles = []
    for index, (kind, colour) in enumerate(KIND_COLOURS.items()):
        mass = (full[:, :-1] * (kinds == index)).sum(1).mean().item()
        share = (kinds == index).float().mean().item()
        handles.append(Patch(color=colour, label=f"{kind}: {share:.0%} of the blocks, {mass:.0%} of the mass"))
    return handles
