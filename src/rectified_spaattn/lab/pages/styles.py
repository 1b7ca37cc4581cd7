"""What every way to attend is called and how it is drawn: one table for commands, pages, figures and studies.

CSV and JSON files hold the keys of `SparseConfig`; people read the labels. Colour says how blocks are rectified, line
how they are made.
"""

from typing import NamedTuple

from ...config import SparseConfig

# Okabe and Ito's palette, which colour-blind readers can tell apart
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
INK = "#222222"  # full attention, wherever it is drawn
FULL = "full"
IN_SPACE, BY_CONTENT = SparseConfig.paper().order, SparseConfig().order


class Style(NamedTuple):
    """label: what people read; order: the one that the label means, any other is named beside it."""

    label: str
    colour: str
    order: str


STYLES: dict[str, Style] = {  # rectify -> ..., in the order of everything that is listed
    "none": Style("plain sparse", VERMILION, IN_SPACE),
    "pooled": Style("pooled", ORANGE, IN_SPACE),
    "ipar": Style("IPAR", SKY, IN_SPACE),
    "ipar+gapr": Style("paper", BLUE, IN_SPACE),
    "row": Style("row", GREEN, BY_CONTENT),
    "row+slope": Style("row+slope", GREY, BY_CONTENT),
    "query+slope": Style("ours", PURPLE, BY_CONTENT),
}
LINES = {"content": "-", "gilbert": "--", "tile": "-.", "raster": ":"}
_BLOCKS = {"content": "by content", "gilbert": "in space", "tile": "in boxes", "raster": "in raster order"}
MARKERS = "osD^vPX"  # of configurations that share colour and line


def label(rectify: str, order: str, sparsity: float | None = None) -> str:
    """ "plain sparse", "paper", "ours", ...; "ours in space" where blocks are made in another way than the name means.

    A mode that is not in the table, such as one of a study, is called as it is.
    """
    style = STYLES.get(rectify)
    words = rectify if style is None else style.label
    if style is None or order != style.order:
        words = f"{words} {_BLOCKS.get(order, order)}"
    return words if sparsity is None else f"{words}, {100 * sparsity:.4g}%"


def label_of(config: SparseConfig) -> str:
    """The label of a config, with what it holds: "ours, 90%", or "ours, error 0.05" with a tolerance."""
    if config.tolerance is None:
        return label(config.rectify, config.order, config.sparsity)
    return f"{label(config.rectify, config.order)}, error {config.tolerance:g}"


def is_ours(config: SparseConfig | None) -> bool:
    """Whether it attends as the package does unless told otherwise."""
    return config is not None and (config.rectify, config.order) == (SparseConfig().rectify, BY_CONTENT)


def colour(rectify: str, spare: int = 0) -> str:
    """Of a mode; one that is not in the table takes a colour that no mode has."""
    free = [each for each in PALETTE if each not in {style.colour for style in STYLES.values()}]
    return STYLES[rectify].colour if rectify in STYLES else free[spare % len(free)]
