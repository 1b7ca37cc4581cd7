"""What to do with dropped blocks: variants of the rectification as dense matrices, judged by calls and by clips.

    python benchmarks/tail_variants.py [--prompts 8] [--block-size 64] [--sparsity 0.9] [--out runs/tail]

Every variant shares the blocks kept (the pooled estimate picks them, but for "sel ..."), on the demo model, with exact
sparsity. Writes tail-ORDER-BLOCK.csv, a line a variant and sparsity: the error of single attention calls that full
attention led to, and PSNR and SSIM of whole clips made with the variant, means and half widths of their 95% intervals.
Nothing here is fast: it computes full attention and throws parts away.
"""

import itertools
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import torch
import typer

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.benchmark.record import machine, write_csv
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.capture import attending
from rectified_spaattn.evaluation.metrics import psnr, ssim
from rectified_spaattn.method.gain import gain
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.select import top_k_of
from rectified_spaattn.pipelines.state import LayerState, key_text_mask


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
    layout: TokenLayout,
    valid: torch.Tensor,
    sparsity: float,
) -> torch.Tensor:
    """q, k, v: [B, S, H, D]; valid: bool [B, text]. Returns [B, S, H, D]; isolated queries attend in full."""
    scale, b, nb = q.shape[-1] ** -0.5, layout.block_size, layout.num_blocks
    order = torch.cat([layout.tiled, layout.isolated])
    q, k, v = (x[:, order].transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    sees = torch.cat([valid.new_ones(len(valid), nb * b + layout.leftover), valid], 1)[:, None, None]
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill_(~sees, -math.inf)
    top = logits.amax(-1, keepdim=True)
    weight = (logits - top).exp_()  # [B, H, S, S]
    alone = weight[:, :, nb * b :] @ v / weight[:, :, nb * b :].sum(-1, keepdim=True)
    weight, top, q = weight[:, :, : nb * b], top[:, :, : nb * b], q[:, :, : nb * b]
    qb, kb, vb = (x[:, :, : nb * b].unflatten(2, (nb, b)) for x in (q, k, v))
    pooled = pool(qb, kb, vb)
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
    kept.scatter_(-1, score.topk(top_k_of(sparsity, nb), -1).indices, True)

    by_row = kept.repeat_interleave(b, 2)
    part = torch.cat([weight[..., : nb * b] * by_row.repeat_interleave(b, 3), weight[..., nb * b :]], -1)
    out, total = part @ v, part.sum(-1, keepdim=True)
    if variant.tail == "none":
        return _back(out / total, alone, order)
    dropped = ~kept
    if variant.gate == "gapr":
        dropped = gain(pooled, kept, "ipar+gapr")
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
        layout = self._layout(q.shape[1]).on(q.device)
        valid = key_text_mask(mask, layout)
        if valid is None:
            valid = q.new_ones(q.shape[0], layout.text, dtype=torch.bool)
        return self.run(self.index, self.owner.step, q, k, v, layout, valid)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant at one sparsity: means over layers, steps and prompts; clips' columns are None without clips."""

    sparsity: float
    variant: str
    block_size: int
    order: str
    error: float
    psnr: float | None = None
    ssim: float | None = None
    psnr_half_width: float | None = None
    ssim_half_width: float | None = None


def half_width(values: list[float]) -> float:
    """Of the 95% interval of the mean."""
    return 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@torch.inference_mode()
def main(
    prompts: int = 8,
    block_size: int = 64,
    order: str = "gilbert",
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    only: Annotated[list[str] | None, typer.Option()] = None,
    calls_only: bool = False,
    out: Path = Path("runs/tail"),
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_demo_pipeline(device)
    pipe.set_progress_bar_config(disable=True)
    asked = list(PROMPTS[:prompts])
    chosen = {name: VARIANTS[name] for name in (only or VARIANTS)}
    sparsities = sparsity or [0.9]
    config = SparseConfig(block_size=block_size, order=order)

    def clips(run: Callable[..., torch.Tensor]) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(0) for _ in asked]
        with attending(pipe, config, partial(Layer, run=run)):
            return pipe(asked, generator=noise).frames.float()

    errors: dict[tuple[str, float, int], list[float]] = {}

    def watch(layer, step, q, k, v, layout, valid):
        exact = attend(Variant(tail="none"), q, k, v, layout, valid, 0.0)
        if step in (2, 6, 10):
            for sparse, (name, variant) in itertools.product(sparsities, chosen.items()):
                difference = attend(variant, q, k, v, layout, valid, sparse) - exact
                relative = difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                errors.setdefault((name, sparse, layer), []).extend(relative.tolist())
        return exact

    full = clips(watch)
    rows: list[Row] = []
    made_on = machine(pipe.device, shlex.join(["python", *sys.argv]))
    print("| sparsity | variant | error | by layer | PSNR, dB | SSIM |\n|---|---|---|---|---|---|")
    for sparse, (name, variant) in itertools.product(sparsities, chosen.items()):
        layers = [fmean(values) for place, values in sorted(errors.items()) if place[:2] == (name, sparse)]
        quality: dict[str, float] = {}
        told = " | "
        if not calls_only:
            video = clips(
                lambda _, __, q, k, v, layout, valid, s=sparse, w=variant: attend(w, q, k, v, layout, valid, s)
            )
            for score in (psnr, ssim):
                values = [score(a[None], b[None]).item() for a, b in zip(video, full, strict=True)]
                quality |= {score.__name__: fmean(values), f"{score.__name__}_half_width": half_width(values)}
            told = " | ".join(f"{quality[each]:.3f} ± {quality[f'{each}_half_width']:.3f}" for each in ("psnr", "ssim"))
        row = Row(sparsity=sparse, variant=name, block_size=block_size, order=order, error=fmean(layers), **quality)
        rows.append(row)
        by_layer = " ".join(f"{each:.3f}" for each in layers)
        print(f"| {sparse:g} | {name} | {row.error:.3f} | {by_layer} | {told} |", flush=True)
        write_csv(out / f"tail-{order}-{block_size}.csv", rows, made_on)  # a stopped run leaves what it measured


if __name__ == "__main__":
    typer.run(main)
