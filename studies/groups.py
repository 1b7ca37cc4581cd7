"""Which order tokens should have where several query heads share a key head: one a key head, or one a query head.

    python -m studies.groups --pairs 2

The demo model's heads share nothing, so groups are made of its calls: 2 or 4 query heads get one key head, which is the
mean of theirs (as long as they are on average) or that of the first. Heads that were trained together will be closer.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rectified_spaattn.config import RECTIFY, SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import attention_error, full_attention
from rectified_spaattn.lab.option import option

from . import harness

GROUPS = ((0, 1), (2, 3), (0, 1, 2, 3))
WAYS = ("a key head", "a query head", "in space")
KEYS = ("mean", "first")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    mode: tuple[str, ...] = option("Modes.", ("row", "query+slope"), choices=tuple(RECTIFY))
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair. heads: of queries for one of keys; order: one a key head, ... (WAYS)."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "rectify", "heads", "keys", "order")
    sparsity: float
    rectify: str
    heads: int
    keys: str
    order: str
    error: float


def grouped(call: AttentionCall, heads: Sequence[int], keys: str) -> AttentionCall:
    """Some query heads of a call with one key head."""
    q, k, v = (x[:, :, list(heads)] for x in (call.q, call.k, call.v))
    if keys == "first":
        return replace(call, q=q, k=k[:, :, :1], v=v[:, :, :1])
    mean = k.mean(2, keepdim=True)
    return replace(call, q=q, k=mean * (k.norm(dim=-1).mean() / mean.norm(dim=-1).mean()), v=v.mean(2, keepdim=True))


def repeated(call: AttentionCall) -> AttentionCall:
    return replace(call, **{name: getattr(call, name).expand_as(call.q) for name in ("k", "v")})


@torch.inference_mode()
def measured(calls: Sequence[AttentionCall], options: Options) -> Iterator[dict[str, Any]]:
    for call, heads, keys in itertools.product(calls, GROUPS, KEYS):
        group = grouped(call, heads, keys)
        full = full_attention(group)
        for sparsity, mode, way in itertools.product(options.sparsity, options.mode, WAYS):
            config = SparseConfig(
                sparsity=sparsity,
                rectify=mode,  # type: ignore[arg-type]
                order="gilbert" if way == "in space" else "content",
                block_size=options.block_size,
                top_p=0.0,
            )
            one = repeated(group) if way == "a query head" else group
            setting = {"sparsity": sparsity, "rectify": mode, "heads": len(heads), "keys": keys, "order": way}
            yield setting | {"error": attention_error(one, config, full=full).relative_error}


def groups(options: Options) -> None:
    """What it costs that query heads which share keys share their order."""

    def show(rows: Sequence[Row]) -> None:
        print(harness.table(rows, ("error",), {"order": "a query head"}, ("error",)))

    harness.run("groups", Row, options, harness.on_calls(Row, options, lambda calls: measured(calls, options)), show)


if __name__ == "__main__":
    harness.main(Options, groups)
