"""How well critical blocks are chosen: selectors judged by exact attention masses, without generating a video.

A selector scores every key block for every query block; the blocks with the highest scores are kept. Those here are
plain functions of one call, float32 [H, nb, nb], batch 0; higher is kept first, none is negative.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import block_masses, full_attention, kept_mass
from rectified_spaattn.method.estimate import estimate
from rectified_spaattn.method.pool import Pooled, pool
from rectified_spaattn.method.select import select
from rectified_spaattn.orders import Blocks

Selector = Callable[[AttentionCall, Blocks], torch.Tensor]
IN_USE = "estimate P (in use)"
ORACLE = "true mass (oracle)"  # no selector of as many blocks captures more mass


@dataclass(frozen=True, kw_only=True)
class SelectionRow:
    """One selector at one sparsity, mean over heads and query blocks.

    recall     share of the k truly heaviest blocks that are among the k kept ones
    captured   full-attention mass on the kept blocks and the isolated tokens
    plain      output error of the call with these blocks and rectify="none"
    rectified  output error with these blocks and the config's rectify mode
    """

    selector: str
    sparsity: float
    recall: float
    captured: float
    plain: float
    rectified: float


def true_masses(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """Exact masses of full attention, one query block at a time: float32 [H, nb, nb + 1], rows of sum 1."""
    return torch.stack([block_masses(call, blocks, head) for head in range(call.q.shape[2])])


def estimated_masses(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """P of the method, from the means of queries and keys: [H, nb, nb + 1], rows of sum 1, isolated tokens last."""
    pooled = _pooled(call, blocks)
    alone = call.k[:1, blocks.isolated].transpose(1, 2)
    return estimate(
        pooled.q,
        pooled.k,
        alone,
        call.valid[:1, blocks.isolated],
        rule=RECTIFY["ipar"],
        scale=_scale(call),
        block_size=blocks.block_size,
        leftover=blocks.leftover,
    )[0]


def by_estimate(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """What the method uses."""
    return estimated_masses(call, blocks)[..., :-1]


def by_second_order(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """P with ½ scale² Σ_d q̄²_nd Var_m,d added to every logit: the next term of the log of a block's mean exp."""
    pooled, k = _pooled(call, blocks), tiles(call.k, blocks)[:1]
    spread = pooled.q.square() @ k.var(3, correction=0).transpose(-1, -2) * _scale(call) ** 2 / 2
    to_blocks = _scale(call) * pooled.q @ pooled.k.transpose(-1, -2) + spread
    # shares among the blocks alone: the isolated tokens are kept anyway and move all columns of a row alike
    return to_blocks.softmax(-1)[0]


def by_quarter_blocks(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """P from means over a quarter of a block, summed over the quarters of a key block: 16 times the estimate's work."""
    q, k = (tiles(x, blocks)[0].unflatten(2, (4, -1)).mean(3).flatten(1, 2) for x in (call.q, call.k))
    to_quarters = (_scale(call) * q @ k.transpose(-1, -2)).softmax(-1)  # [H, 4 nb, 4 nb]
    return to_quarters.unflatten(2, (-1, 4)).sum(3).unflatten(1, (-1, 4)).mean(2)


def by_mean_query(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """The masses that the mean query gives to every single key: only the queries are pooled."""
    logits = _scale(call) * _pooled(call, blocks).q @ tiles(call.k, blocks)[:1].flatten(2, 3).transpose(-1, -2)
    return logits.softmax(-1)[0].unflatten(-1, (blocks.num_blocks, blocks.block_size)).sum(-1)


def by_output_error(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """P_nm |v̄_m - out_n|: how far the output moves when block m is left out, out_n being the estimated output."""
    probability, v = estimated_masses(call, blocks), _pooled(call, blocks).v[0]
    to_blocks = probability[..., :-1] / probability[..., :-1].sum(-1, keepdim=True)
    return to_blocks * torch.cdist(to_blocks @ v, v)  # [H, nb, nb]


def by_chance(call: AttentionCall, blocks: Blocks) -> torch.Tensor:
    """The floor; the same numbers for every call of a shape."""
    generator = torch.Generator().manual_seed(0)
    shape = (call.q.shape[2], blocks.num_blocks, blocks.num_blocks)
    return torch.rand(shape, generator=generator).to(call.q.device)


SELECTORS: dict[str, Selector] = {
    IN_USE: by_estimate,
    "P + second order": by_second_order,
    "P of quarter blocks": by_quarter_blocks,
    "mean query, all keys": by_mean_query,
    "P x change of output": by_output_error,
    "random": by_chance,
}


def keep_best(scores: torch.Tensor, blocks: Blocks, sparsity: float) -> torch.Tensor:
    """The blocks a selector keeps at a sparsity, and no others: bool [H, nb, nb]. scores: [H, nb, nb], not negative."""
    exact = SparseConfig(sparsity=sparsity, top_p=0.0, neighbours=False)
    return select(torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)[None], blocks, exact)[0]


def best_as_many(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """As many blocks a head as in `kept`, by score, and the same number in every row (give or take one).

    scores: [H, nb, nb]; kept and what is returned: bool [H, nb, nb].
    """
    rows, total = kept.shape[1], kept.sum((1, 2))  # [H]
    turn = (torch.arange(rows, device=kept.device) * 0.618 % 1).argsort().argsort()  # neighbours are far apart in it
    per_row = total[:, None] // rows + (turn < (total % rows)[:, None])  # the remainder goes to the first in turn
    return _rank(scores) < per_row[..., None]


def recall(kept: torch.Tensor, true: torch.Tensor) -> float:
    """Share of the truly heaviest blocks that are kept, as many a row as the row keeps. kept: bool [H, nb, nb]; true:
    [H, nb, nb + 1]."""
    heaviest = _rank(true[..., :-1]) < kept.sum(-1, keepdim=True)
    return ((kept & heaviest).sum(-1) / kept.sum(-1)).mean().item()


def study_selection(call: AttentionCall, config: SparseConfig, sparsities: Sequence[float]) -> list[SelectionRow]:
    """At every sparsity every selector, on all heads of one call; batch 0 alone. config: block_size, order, rectify."""
    call = first_sample(call).in_order(config)
    blocks = call.blocks(config)
    true, full = true_masses(call, blocks), full_attention(call)
    rows = []
    for name, selector in {ORACLE: lambda call, blocks: true[..., :-1], **SELECTORS}.items():
        scores = selector(call, blocks)
        for sparsity in sparsities:
            kept = keep_best(scores, blocks, sparsity)
            plain, rectified = (
                output_error(call, config.replace(rectify=mode), kept, full) for mode in ("none", config.rectify)
            )
            rows.append(
                SelectionRow(
                    selector=name,
                    sparsity=sparsity,
                    recall=recall(kept, true),
                    captured=kept_mass(kept, true),
                    plain=plain,
                    rectified=rectified,
                )
            )
    return sorted(rows, key=lambda row: row.sparsity)


def output_error(call: AttentionCall, config: SparseConfig, kept: torch.Tensor, full: torch.Tensor) -> float:
    """|out - full| / |full| over the tiled tokens with the critical blocks `kept`, bool [H, nb, nb].

    call: one sample; full: what full_attention(call) gave.
    """
    out, _ = call.sparse(config, block_mask=kept[None])
    tiled = call.blocks(config).tiled
    exact = full[:, tiled]
    return ((out[:, tiled] - exact).norm() / exact.norm()).item()


def first_sample(call: AttentionCall) -> AttentionCall:
    """The same call with batch 0 alone."""
    return replace(call, q=call.q[:1], k=call.k[:1], v=call.v[:1], text_mask=call.text_mask[:1])


def tiles(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """[B, S, H, D] -> the tiled tokens, [B, H, nb, b, D]."""
    return x[:, blocks.tiled].transpose(1, 2).unflatten(2, (blocks.num_blocks, blocks.block_size))


def _rank(scores: torch.Tensor) -> torch.Tensor:
    """Place of every block in its row, 0 for the highest score; of equal ones the lower index comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _pooled(call: AttentionCall, blocks: Blocks) -> Pooled:
    q, k, v = (tiles(x, blocks)[:1] for x in (call.q, call.k, call.v))
    return pool(q, k, v, RECTIFY["ipar"])


def _scale(call: AttentionCall) -> float:
    return 1 / math.sqrt(call.q.shape[-1])
