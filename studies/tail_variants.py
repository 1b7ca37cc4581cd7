"""What to do with dropped blocks: variants of the rectification as dense matrices, judged by calls and by clips.

    python -m studies.tail_variants --pairs 8 --batch 8 [--only "row + s2"] [--calls-only]

Every variant shares the blocks kept (the pooled estimate picks them, but for "sel ..."), with exact sparsity. `error`
is that of single attention calls that full attention led to. Nothing here is fast: it computes full attention and
throws parts away.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar

import torch

from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import attending
from rectified_spaattn.lab.clips.metrics import psnr, ssim
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.gain import gain
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.select import top_k_of
from rectified_spaattn.orders import Blocks, blocks_of
from rectified_spaattn.pipelines.masks import key_text_mask
from rectified_spaattn.pipelines.state import LayerState

from . import harness
from .harness import EXACT


@dataclass(frozen=True, kw_only=True)
class Variant:
    """tail: "none", "block" (R_n and C_n) or "row" (compensated blocks join every row's softmax).

    gate      which dropped blocks are compensated: "all", "gapr", or a largest σ² as in "s2<2"
    variance  factor of σ² in the logit: ½ is the second order of log-mean-exp; `own`: by the row's query, not the mean
    cap       largest addition to a logit
    first     weight of the first-order value term scale * q_i·H, one H a head; `per_block`: one H a block
    pools     pools a block in the tail
    select    "estimate", "true" (exact block mass), "second" (estimate + ½σ²)
    exact     the block's true mass for that row in place of any estimate
    """

    tail: str = "row"
    gate: str = "all"
    variance: float = 0.5
    own: bool = False
    cap: float = math.inf
    first: float = 0.0
    per_block: bool = False
    pools: int = 1
    select: str = "estimate"
    exact: bool = False
    pooled_query: bool = False


VARIANTS: dict[str, Variant] = {
    "none": Variant(tail="none"),
    "ipar": Variant(tail="block"),
    "ipar+gapr": Variant(tail="block", gate="gapr"),
    "row": Variant(variance=0),
    "row + s2": Variant(),
    "row + s2, cap 0.5": Variant(cap=0.5),
    "row + s2, cap 1": Variant(cap=1),
    "row + s2, cap 2": Variant(cap=2),
    "row + s2, own query": Variant(own=True),
    "row + s2, gapr": Variant(gate="gapr"),
    "row + s2, gate s2<1": Variant(gate="s2<1"),
    "row + s2, gate s2<2": Variant(gate="s2<2"),
    "row, pooled query": Variant(pooled_query=True),
    "row, exact mass": Variant(exact=True),
    "row + H": Variant(variance=0, first=1),
    "row + s2 + H": Variant(first=1),
    "row + s2 + H/2": Variant(first=0.5),
    "row + s2 + H, gapr": Variant(first=1, gate="gapr"),
    "row + s2 + H, cap 1": Variant(first=1, cap=1),
    "row + s2 + H a block": Variant(first=1, per_block=True),
    "row, exact mass + H": Variant(exact=True, first=1),
    "row + s2, pools b/4": Variant(pools=4),
    "row + s2 + H, pools b/4": Variant(pools=4, first=1),
    "none, sel true": Variant(tail="none", select="true"),
    "none, sel second": Variant(tail="none", select="second"),
    "row + s2 + H, sel true": Variant(first=1, select="true"),
    "row + s2 + H, sel second": Variant(first=1, select="second"),
}


def attend(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor,
    sparsity: float,
) -> torch.Tensor:
    """q, k, v: [B, S, H, D]; valid: bool [B, text]. Returns [B, S, H, D]; isolated queries attend in full."""
    scale, b, nb = q.shape[-1] ** -0.5, blocks.block_size, blocks.num_blocks
    order = torch.cat([blocks.tiled, blocks.isolated])
    q, k, v = (x[:, order].transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    sees = torch.cat([valid.new_ones(len(valid), nb * b + blocks.leftover), valid], 1)[:, None, None]
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill_(~sees, -math.inf)
    top = logits.amax(-1, keepdim=True)
    weight = (logits - top).exp_()  # [B, H, S, S]
    alone = weight[:, :, nb * b :] @ v / weight[:, :, nb * b :].sum(-1, keepdim=True)
    weight, top, q = weight[:, :, : nb * b], top[:, :, : nb * b], q[:, :, : nb * b]
    qb, kb, vb = (x[:, :, : nb * b].unflatten(2, (nb, b)) for x in (q, k, v))
    pooled = pool(qb, kb, vb, RECTIFY["ipar+gapr"])
    var = kb.var(3, unbiased=False)
    s2 = scale**2 * pooled.q.square() @ var.transpose(-1, -2)  # [B, H, nb, nb]
    mass = weight[..., : nb * b].unflatten(-1, (nb, b)).sum(-1)  # [B, H, nb * b, nb]
    estimated = scale * pooled.q @ pooled.k.transpose(-1, -2) + math.log(b)
    score = estimated
    if variant.select == "true":
        score = (mass / weight.sum(-1, keepdim=True)).unflatten(2, (nb, b)).mean(3)
    elif variant.select == "second":
        score = estimated + s2 / 2
    kept = torch.zeros_like(estimated, dtype=torch.bool)
    kept.scatter_(-1, score.topk(top_k_of(EXACT.replace(sparsity=sparsity), nb), -1).indices, True)

    by_row = kept.repeat_interleave(b, 2)
    part = torch.cat([weight[..., : nb * b] * by_row.repeat_interleave(b, 3), weight[..., nb * b :]], -1)
    out, total = part @ v, part.sum(-1, keepdim=True)
    if variant.tail == "none":
        return _back(out / total, alone, order)
    dropped = ~kept
    if variant.gate == "gapr":
        dropped = gain(pooled, kept, RECTIFY["ipar+gapr"])
    elif variant.gate.startswith("s2<"):
        dropped = dropped & (s2 < float(variant.gate[3:]))
    if variant.tail == "block":
        isolated = (scale * pooled.q @ k[:, :, nb * b :].transpose(-1, -2)).masked_fill(~sees[..., nb * b :], -math.inf)
        p = torch.cat([estimated, isolated], -1).softmax(-1)[..., :nb] * dropped
        r, c = 1 - p.sum(-1), p @ pooled.v
        out = (out / total).unflatten(2, (nb, b)) * r[..., None, None] + c[..., None, :]
        return _back(out.flatten(2, 3), alone, order)

    n = variant.pools
    k_tail, v_tail = (x.unflatten(3, (n, b // n)).mean(4).flatten(2, 3) for x in (kb, vb))  # [B, H, nb * n, D]
    var = kb.unflatten(3, (n, b // n)).var(4, unbiased=False).flatten(2, 3)
    asked = qb.mean(3).repeat_interleave(b, 2) if variant.pooled_query else q
    tail = scale * asked @ k_tail.transpose(-1, -2) + math.log(b // n)
    if variant.exact:
        tail = mass.log() + top
    elif variant.variance:
        second = variant.variance * scale**2
        if variant.own:
            tail += (second * q.square() @ var.transpose(-1, -2)).clamp(max=variant.cap)
        else:
            tail += (second * pooled.q.square() @ var.transpose(-1, -2)).clamp(max=variant.cap).repeat_interleave(b, 2)
    tail = (tail - top).exp() * dropped.repeat_interleave(n, 3).repeat_interleave(b, 2)  # [B, H, nb * b, nb * n]
    share = tail.sum(-1, keepdim=True)
    out = out + tail @ v_tail
    if variant.first:
        around_k = kb.unflatten(3, (n, b // n)) - k_tail.unflatten(2, (nb, n))[..., None, :]
        around_v = vb.unflatten(3, (n, b // n)) - v_tail.unflatten(2, (nb, n))[..., None, :]
        if variant.per_block:
            h = torch.einsum("zhnpbd,zhnpbe->zhnde", around_k, around_v) / b
            moved = torch.stack([q @ h[:, :, m] for m in range(nb)], -2)  # [B, H, nb * b, nb, D]
            out = out + variant.first * scale * (tail[..., None] * moved).sum(-2)
        else:
            h = torch.einsum("zhnpbd,zhnpbe->zhde", around_k, around_v) / (nb * b)
            out = out + variant.first * scale * share * (q @ h)
    return _back(out / (total + share), alone, order)


def _back(tiled: torch.Tensor, alone: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, H, tokens, D] of both kinds -> [B, S, H, D] in the model's order."""
    ordered = torch.cat([tiled, alone], 2).transpose(1, 2)
    return torch.empty_like(ordered).index_copy_(1, order, ordered)


@dataclass(kw_only=True)
class Layer(LayerState):
    run: Callable[..., torch.Tensor]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        layout = self._layout(q.shape[1])
        blocks = blocks_of(layout, self.owner.config).on(q.device)
        valid = key_text_mask(mask, layout)
        if valid is None:
            valid = q.new_ones(q.shape[0], layout.text, dtype=torch.bool)
        return self.run(self.index, self.owner.step, q, k, v, blocks, valid)


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.9,))
    step: tuple[int, ...] = option("Denoising steps whose attention calls are judged, from 0.", (2, 6, 10))
    block_size: int = option("Tokens a block.", EXACT.block_size)
    order: str = option("How tokens are put in blocks, in space.", EXACT.order)
    only: tuple[str, ...] = option("Variants.", (), choices=tuple(VARIANTS), unset="all")
    calls_only: bool = option("No clips.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.only) - set(VARIANTS))
        if unknown:
            raise ValueError(f"only: got {unknown}; allowed: {', '.join(VARIANTS)}.")


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One pair: error is the mean over layers and steps; psnr and ssim of the clip, NaN without clips."""

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "variant", "block_size", "order")
    sparsity: float
    variant: str
    block_size: int
    order: str
    error: float
    psnr: float = math.nan
    ssim: float = math.nan


def tail_variants(options: Options) -> None:
    """What to do with dropped blocks."""
    config = EXACT.replace(block_size=options.block_size, order=options.order)
    chosen = {name: VARIANTS[name] for name in (options.only or VARIANTS)}

    def clips(pipe, pairs, attend_by):
        noise = [torch.Generator().manual_seed(pair.seed) for pair in pairs]
        run = {"height": options.size, "width": options.size, "num_inference_steps": options.steps}
        with attending(pipe, config, partial(Layer, run=attend_by)):
            return pipe([pair.prompt for pair in pairs], **run, generator=noise).frames.float()

    @torch.inference_mode()
    def measure(pipe, pairs, say):
        pipe.set_progress_bar_config(disable=True)
        errors: dict[tuple[float, str], list[list[float]]] = defaultdict(list)  # of calls, of pairs

        def judge(layer, step, q, k, v, blocks, valid):
            exact = attend(Variant(tail="none"), q, k, v, blocks, valid, 0.0)
            if step in options.step and (not options.layer or layer in options.layer):
                for sparsity, (name, variant) in itertools.product(options.sparsity, chosen.items()):
                    apart = (attend(variant, q, k, v, blocks, valid, sparsity) - exact).flatten(1).norm(dim=1)
                    errors[sparsity, name].append((apart / exact.flatten(1).norm(dim=1)).tolist())
            return exact

        full = clips(pipe, pairs, judge)
        for sparsity, (name, variant) in itertools.product(options.sparsity, chosen.items()):
            say(f"{name} at {sparsity:g}")
            scores = [{} for _ in pairs]
            if not options.calls_only:
                video = clips(pipe, pairs, lambda _, __, *call, s=sparsity, w=variant: attend(w, *call, s))
                both = zip(psnr(video, full).tolist(), ssim(video, full).tolist(), strict=True)
                scores = [{"psnr": peak, "ssim": similar} for peak, similar in both]
            of_pairs = map(fmean, zip(*errors[sparsity, name], strict=True))
            for pair, error, score in zip(pairs, of_pairs, scores, strict=True):
                setting = dict(zip(Row.KEYS, (sparsity, name, options.block_size, options.order), strict=True))
                yield Row(prompt=pair.prompt, seed=pair.seed, **setting, error=error, **score)

    def show(rows):
        print(harness.table(rows, ("error", "psnr", "ssim"), {"variant": "none"}, ("psnr",)))

    harness.run("tail_variants", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, tail_variants)
