"""What the steps from "row" to "query+slope" are worth at several numbers of kept blocks.

    python -m studies.slope --pairs 4 --step 3 --step 6 --step 9

They are three: the slope and the choice by error, each alone and together ("row+slope"), and single queries besides.

`error` is that of single attention calls that full attention led to; all keep exactly as many blocks (`top_p` of 0).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rectified_spaattn.config import ORDERS, RECTIFY, Rule, SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import attention_error, full_attention
from rectified_spaattn.lab.option import option

from . import harness

RECTIFY["slope alone"] = Rule(tail=True, slope=True)
RECTIFY["choice alone"] = Rule(tail=True, choice="error")
MODES = ("row", "slope alone", "choice alone", "row+slope", "query+slope")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    kept: tuple[int, ...] = option("Kept blocks, the mean of all rows.", (24, 12, 6, 4, 3, 2))
    mode: tuple[str, ...] = option("Modes.", MODES, choices=MODES)
    order: tuple[str, ...] = option("How tokens are put in blocks.", ("content",), choices=ORDERS)
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair."""

    KEYS: ClassVar[tuple[str, ...]] = ("kept", "order", "mode")
    kept: int
    order: str
    mode: str
    error: float
    density: float


def measured(calls: Sequence[AttentionCall], options: Options) -> Iterator[dict[str, Any]]:
    for call in calls:
        full = full_attention(call)
        for kept, order, mode in itertools.product(options.kept, options.order, options.mode):
            config = SparseConfig(rectify=mode, order=order, block_size=options.block_size, top_p=0.0)  # type: ignore[arg-type]
            share = (kept + 0.5) / call.blocks(config).num_blocks  # the half keeps a rounded product from falling below
            got = attention_error(call, config.replace(sparsity=max(0.0, 1 - share)), full=full)
            yield {
                "kept": kept,
                "order": order,
                "mode": mode,
                "error": got.relative_error,
                "density": got.stats.density,
            }


def slope(options: Options) -> None:
    """What a slope and blocks chosen by error are worth."""

    def show(rows):
        print(harness.table(rows, ("error", "density"), {"mode": "row"}, ("error",)))

    harness.run("slope", Row, options, harness.on_calls(Row, options, lambda calls: measured(calls, options)), show)


if __name__ == "__main__":
    harness.main(Options, slope)
