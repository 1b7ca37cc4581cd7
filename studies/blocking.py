"""What order, block size, neighbours and top-p are worth, on attention inputs of the demo model.

    python -m studies.blocking --pairs 6 --layer 1 --layer 4

Neighbours and top-p keep more blocks than the sparsity asks for, so each setting is also compared with as many blocks
chosen by P alone: the gap at equal pairs, below 0 where the setting is the better use of the pairs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention, kept_mass
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.density import density
from rectified_spaattn.method.select import select

from . import harness
from .harness import EXACT
from .selectors import best_as_many, estimated_masses, output_error, true_masses

TOP_P = 0.3


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    order: tuple[str, ...] = option("Ways to lay out the tokens.", ("gilbert", "tile", "raster"))
    block_size: tuple[int, ...] = option("Tokens a block.", (64, 128))
    rectify: str = option("Mode of the error.", EXACT.rectify)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair.

    density   computed query-key pairs over all pairs
    captured  full-attention mass on the critical blocks and the isolated tokens
    error     |out - full| / |full| over the tiled tokens
    equal_*   the same for as many blocks in all, chosen by P alone; gap: error - equal_error
    """

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "order", "block_size", "neighbours", "top_p", "rectify")
    sparsity: float
    order: str
    block_size: int
    neighbours: bool
    top_p: float
    rectify: str
    density: float
    captured: float
    error: float
    equal_captured: float
    equal_error: float

    @property
    def gap(self) -> float:
        return self.error - self.equal_error


def measured(call: AttentionCall, options: Options) -> Iterator[dict[str, Any]]:
    """Every setting on one call."""
    full = full_attention(call)
    for order, size in itertools.product(options.order, options.block_size):
        config = EXACT.replace(order=order, block_size=size, rectify=options.rectify)
        blocks = call.blocks(config)
        true, estimated = true_masses(call, blocks), estimated_masses(call, blocks)
        known: dict[bytes, tuple[float, float]] = {}  # settings often keep the same blocks

        def judge(kept, known=known, config=config, true=true):
            key = kept.cpu().numpy().tobytes()
            if key not in known:
                known[key] = (kept_mass(kept, true), output_error(call, config, kept, full))
            return known[key]

        for sparsity, neighbours, top_p in itertools.product(options.sparsity, (False, True), (0.0, TOP_P)):
            setting = {"sparsity": sparsity, "neighbours": neighbours, "top_p": top_p}
            wanted = config.replace(**setting)
            kept = select(estimated[None], blocks, wanted)[0]
            as_many = best_as_many(estimated[..., :-1], kept)
            values = [density(kept[None], call.layout, wanted, call.text_mask).item(), *judge(kept), *judge(as_many)]
            names = ("density", "captured", "error", "equal_captured", "equal_error")
            yield {
                **setting,
                "order": order,
                "block_size": size,
                "rectify": options.rectify,
                **dict(zip(names, values, strict=True)),
            }


def blocking(options: Options) -> None:
    """What order, block size, neighbours and top-p are worth."""

    def judge(calls):
        return itertools.chain.from_iterable(measured(call, options) for call in calls)

    def show(rows):
        measures = ("density", "captured", "error", "gap")
        print(harness.table(rows, measures, {"order": "gilbert", "block_size": 64}, ("error",)))

    harness.run("blocking", Row, options, harness.on_calls(Row, options, judge), show)


if __name__ == "__main__":
    harness.main(Options, blocking)
