"""How well critical blocks are chosen on the demo model's attention: recall, captured mass and the error that follows.

    python -m studies.selection --pairs 8

Every selector of `selectors.py` keeps exactly as many blocks as the sparsity says.
"""

from dataclasses import dataclass
from typing import ClassVar

from rectified_spaattn.lab.option import option

from . import harness
from .harness import EXACT
from .selectors import IN_USE, study_selection


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    block_size: int = option("Tokens a block.", EXACT.block_size)
    order: str = option("How tokens are put in blocks.", EXACT.order)
    rectify: str = option("The mode that is judged beside none.", EXACT.rectify)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair; see selectors.SelectionRow for what is measured."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "selector", "rectify")
    sparsity: float
    selector: str
    rectify: str
    recall: float
    captured: float
    plain: float
    rectified: float


def selection(options: Options) -> None:
    """How well critical blocks are chosen."""
    config = EXACT.replace(block_size=options.block_size, order=options.order, rectify=options.rectify)

    def judge(calls):
        for call in calls:
            for row in study_selection(call, config, options.sparsity):
                yield vars(row) | {"rectify": config.rectify}

    def show(rows):
        measures = ("recall", "captured", "plain", "rectified")
        print(harness.table(rows, measures, {"selector": IN_USE}, ("rectified",)))

    harness.run("selection", Row, options, harness.on_calls(Row, options, judge), show)


if __name__ == "__main__":
    harness.main(Options, selection)
