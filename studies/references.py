"""Reference tokens in one order by content with the video, or each sorted among themselves, on the demo model.

    python -m studies.references --pairs 4

A call with references is made of two captured ones of the same layer and pair: the video's at a step, and, before it,
the tokens of the last step, where the video is nearly done: what an edit has as its reference, of the video's length
and at the same places. Text stands alone. "together" is order="content" over both; "apart" gives the operator an order
in which every block holds tokens of one of the two. What is kept and computed is the same in both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.method.arrange import content_order

from . import harness

TOGETHER = "together"


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair.

    video, reference  |out - full| / |full| over those tokens
    density           executed pairs, of all
    """

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "order")
    sparsity: float
    order: str
    video: float
    reference: float
    density: float


def with_reference(call: AttentionCall, done: AttentionCall) -> AttentionCall:
    """The call with the video tokens of `done` before its own tokens."""
    q, k, v = (
        torch.cat([other[:, done.video], own], dim=1)
        for other, own in ((done.q, call.q), (done.k, call.k), (done.v, call.v))
    )
    tokens = done.video.numel()
    places = torch.cat([torch.arange(tokens), call.video + tokens])
    return replace(call, q=q, k=k, v=v, layout=TokenLayout.of(q.shape[1], places))


def order_apart(call: AttentionCall, config: SparseConfig) -> torch.Tensor:
    """int64 [B, H, nb * b]: the first half of the tiled tokens in blocks of their own, then the second."""
    halves = call.blocks(config).tiled.chunk(2)
    scale = call.q.shape[-1] ** -0.5
    return torch.cat([content_order(call.q, call.k, h, block_size=config.block_size, scale=scale) for h in halves], -1)


def judge_all(calls: Sequence[AttentionCall], options: harness.Options) -> Iterator[dict[str, Any]]:
    last = options.steps - 1
    done = {call.layer: call for call in calls if call.step == last}
    for call in (each for each in calls if each.step in options.step):
        both = with_reference(call, done[call.layer])
        full, (reference, video) = full_attention(both), both.video.chunk(2)
        for sparsity in options.sparsity:
            config = SparseConfig(block_size=64, top_p=0.0, sparsity=sparsity)
            for order, given in ((TOGETHER, {}), ("apart", {"token_order": order_apart(both, config)})):
                out, stats = both.sparse(config, **given)
                errors = (((out - full)[:, at].norm() / full[:, at].norm()).item() for at in (video, reference))
                yield {
                    "sparsity": sparsity,
                    "order": order,
                    **dict(zip(("video", "reference"), errors, strict=True)),
                    "density": float(stats.density),
                }


def references(options: harness.Options) -> None:
    """Reference tokens sorted together with the video, or apart."""

    def show(rows: list[Row]) -> None:
        print(harness.table(rows, ("video", "reference", "density"), {"order": TOGETHER}, ("video", "reference")))

    steps = sorted({*options.step, options.steps - 1})
    measure = harness.on_calls(Row, options, lambda calls: judge_all(calls, options), steps)
    harness.run("references", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(harness.Options, references)
