"""Which part of the paper's rectification helps: output errors of single calls with parts of it left out.

    python -m studies.parts --pairs 14 --step 3 --step 6 --step 9

All variants keep the same blocks. `accepted` is the share of dropped blocks that GAPR compensates, `kept_mass` the
exact mass of critical blocks and isolated tokens, `estimated` what P says of it. --by-layer parts layers and steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention, kept_mass
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.estimate import estimate
from rectified_spaattn.method.gain import gain
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.rectify import rectify
from rectified_spaattn.orders import Blocks

from . import harness
from .harness import EXACT
from .selectors import tiles, true_masses

MEASURES = ("relative_error", "kept_mass", "estimated", "accepted")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    block_size: int = option("Tokens a block.", EXACT.block_size)
    by_layer: bool = option("One line a layer and step.", False)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One call, or with step and layer -1 the mean over the calls of a pair; the error is over the tiled tokens."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "variant", "layer", "step")
    sparsity: float
    variant: str
    layer: int
    step: int
    relative_error: float
    kept_mass: float
    estimated: float
    accepted: float


def variants(call: AttentionCall, sparsity: float, block_size: int) -> Iterator[dict[str, Any]]:
    """MEASURES of every variant, batch 0."""
    config = EXACT.replace(sparsity=sparsity, rectify="none", block_size=block_size)
    blocks, scale = call.blocks(config), call.q.shape[-1] ** -0.5
    q, k, v = (tiles(x, blocks) for x in (call.q, call.k, call.v))
    ipar, paper = RECTIFY["ipar"], RECTIFY["ipar+gapr"]
    pooled = pool(q, k, v, paper)

    def estimated(rule):
        alone, valid = call.k[:, blocks.isolated].transpose(1, 2), call.valid[:, blocks.isolated]
        sizes = {"block_size": block_size, "leftover": blocks.leftover}
        return estimate(pooled.q, pooled.k, alone, valid, rule=rule, scale=scale, **sizes)

    exact = tiles(full_attention(call), blocks)
    plain, stats = call.sparse(config)
    sparse, critical = tiles(plain, blocks), stats.block_mask
    every, gated = ~critical, gain(pooled, critical, paper)
    both = rectify(estimated(ipar), every, pooled.v)
    no_log_b = rectify(estimated(ipar._replace(log_b=False)), every, pooled.v)
    text_pooled = rectify(estimated(RECTIFY["pooled"]), every, pooled.v)
    with_gain = rectify(estimated(paper), gated, pooled.v)
    exact_r = row_masses(call, blocks, critical)
    outputs = {
        "none": sparse,
        "pooled: text pooled, no log b": _apply(sparse, text_pooled.r, text_pooled.c),
        "text isolated, no log b": _apply(sparse, no_log_b.r, no_log_b.c),
        "ipar": _apply(sparse, both.r, both.c),
        "ipar, R only": _apply(sparse, both.r, 0 * both.c),
        "ipar, C only": _apply(sparse, torch.ones_like(both.r), both.c),
        "ipar+gapr": _apply(sparse, with_gain.r, with_gain.c),
        "exact mass of every row for R, C as in ipar": exact_r * sparse + both.c[..., None, :],
    }
    shared = {
        "kept_mass": kept_mass(critical[0], true_masses(call, blocks)),
        "estimated": kept_mass(critical, stats.probability),
        "accepted": (gated.sum() / every.sum()).item(),
    }
    for name, out in outputs.items():
        error = ((out - exact).norm() / exact.norm()).item()
        yield {"sparsity": sparsity, "variant": name, "relative_error": error, **shared}


def row_masses(call: AttentionCall, blocks: Blocks, critical: torch.Tensor) -> torch.Tensor:
    """Exact mass that every single query gives to its critical blocks and the isolated tokens: [B, H, nb, b, 1]."""
    q, k = (x.transpose(1, 2) for x in (call.q, call.k))
    logits = q[:, :, blocks.tiled] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, nb * b, S]
    logits.masked_fill_(~call.valid[:, None, None], -math.inf)
    to_blocks = logits.softmax(-1)[..., blocks.tiled].unflatten(-1, (blocks.num_blocks, blocks.block_size)).sum(-1)
    dropped = ~critical.repeat_interleave(blocks.block_size, 2)  # [B, H, nb * b, nb]
    kept = 1 - (to_blocks * dropped).sum(-1, keepdim=True)
    return kept.unflatten(2, (blocks.num_blocks, blocks.block_size))


def _apply(sparse: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # [B, H, nb, b, D], [B, H, nb], [B, H, nb, D]
    return sparse * r[..., None, None] + c[..., None, :]


def parts(options: Options) -> None:
    """Which part of the paper's rectification helps."""

    def judge(calls):
        for call in calls:
            place = {"layer": call.layer, "step": call.step} if options.by_layer else {"layer": -1, "step": -1}
            for sparsity in options.sparsity:
                for values in variants(call, sparsity, options.block_size):
                    yield place | values

    def show(rows):
        print(harness.table(rows, MEASURES, {"variant": "none"}, ("relative_error",)))

    harness.run("parts", Row, options, harness.on_calls(Row, options, judge), show)


if __name__ == "__main__":
    harness.main(Options, parts)
