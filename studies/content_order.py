"""Ways to sort the tokens of a head before they are cut into blocks, on attention inputs of the demo model.

    python benchmarks/content_order.py [--prompts 4] [--block-size 64] [--only "in space"] [--out runs/content-order]

Attention calls of full-attention runs, all layers at two steps, seed 0. Tokens are moved to the order under test, the
operator runs on them with a layout in space, and its output is moved back; "content" is what order="content" does.
"order of N steps earlier" sorts by the same layer's q and k of an earlier step, or of the first where there are fewer
than N before. A way that cannot make as many blocks as there are is left out. Writes content-order.csv, one line a
prompt, way, block size and sparsity (means over layers and steps), and prints a Markdown table: mean [95% interval over
the prompts].
"""

import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.progress import Progress

from rectified_spaattn import SparseConfig, rectified_attention
from rectified_spaattn.benchmark.record import Machine, machine, read_csv, write_csv
from rectified_spaattn.demo.pipeline import load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.evaluation.attention_error import full_attention
from rectified_spaattn.evaluation.capture import AttentionCall, capture_calls
from rectified_spaattn.evaluation.intervals import bootstrap
from rectified_spaattn.evaluation.paired import Pair, Settings
from rectified_spaattn.evaluation.selection import captured_mass, true_masses
from rectified_spaattn.layout import TokenLayout
from rectified_spaattn.method import arrange as library
from rectified_spaattn.method.arrange import arrange, content_order, k_d_order, moments, put_back, sample_of

STEPS = 12
IN_USE = "content"
Orders = tuple[torch.Tensor, torch.Tensor]  # of queries and of keys, each int64 [B, H, nb * b], places in the sequence
Space = Callable[[AttentionCall, TokenLayout], torch.Tensor]  # the tiled tokens in it: [Z, n, 2D]
Cut = Callable[[torch.Tensor, int], torch.Tensor]  # features [Z, n, r] and block size -> order, int64 [Z, n]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means over the calls of one prompt.

    captured  full-attention mass on the critical blocks and the isolated tokens
    error     |out - full| / |full| over the video tokens
    """

    prompt: str
    seed: int
    way: str
    block_size: int
    sparsity: float
    rectify: str
    captured: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """sort(call, layout) gives the orders; back: how many steps earlier the call is; blocks: how many it can make."""

    sort: Callable[[AttentionCall, TokenLayout], Orders]
    back: int = 0
    blocks: Callable[[int], bool] = lambda count: True


def in_space(call: AttentionCall, layout: TokenLayout) -> Orders:
    order = layout.tiled.expand(call.q.shape[0], call.q.shape[2], -1)
    return order, order


def by_content(call: AttentionCall, layout: TokenLayout, **constants: int) -> Orders:
    """The order in use; constants: those of method/arrange.py to replace."""
    with patch.dict(vars(library), constants):
        order = content_order(call.q, call.k, layout.tiled, block_size=layout.block_size, scale=_scale(call))
    return order, order


def by_directions(call: AttentionCall, layout: TokenLayout, *, cut: Cut, rank: int, space: Space) -> Orders:
    """One order for queries and keys."""
    order = _placed(cut(principal(space(call, layout), rank), layout.block_size), call, layout)
    return order, order


def apart(call: AttentionCall, layout: TokenLayout) -> Orders:
    """Queries by the features of queries alone, keys by those of keys alone."""
    q, k = weighted(call, layout).chunk(2, dim=2)
    order_q, order_k = (_placed(k_d(principal(half, 8), layout.block_size), call, layout) for half in (q, k))
    return order_q, order_k


def keys_only(call: AttentionCall, layout: TokenLayout) -> Orders:
    return in_space(call, layout)[0], apart(call, layout)[1]


def weighted(call: AttentionCall, layout: TokenLayout) -> torch.Tensor:
    """[q M_k½, k M_q½] of every tiled token: the space in which content_order looks for directions."""
    weigh = moments(sample_of(call.q, layout.tiled), sample_of(call.k, layout.tiled), _scale(call)).weigh
    values, vectors = torch.linalg.eigh(weigh.double())
    half = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.transpose(1, 2)
    return _tokens(call, layout) @ half.float()


def unweighted(call: AttentionCall, layout: TokenLayout) -> torch.Tensor:
    """[q, k], each over its standard deviation."""
    halves = _tokens(call, layout).chunk(2, dim=2)
    return torch.cat([half / half.var(1).sum(1).sqrt()[:, None, None] for half in halves], dim=2)


def principal(x: torch.Tensor, rank: int) -> torch.Tensor:
    """x [Z, n, D] along its principal directions, the widest first: [Z, n, rank]."""
    apart = x - x.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh((apart.transpose(1, 2) @ apart).double())
    return apart @ vectors[..., -rank:].flip(-1).float()


def k_d(features: torch.Tensor, block_size: int) -> torch.Tensor:
    return k_d_order(features.to(torch.bfloat16), block_size)


def across_widest(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every node in two halves along its own principal direction; as many blocks as a power of two."""
    order = torch.arange(features.shape[1]).expand(features.shape[:2])
    size = features.shape[1]
    while size > block_size:
        nodes = features.gather(1, order[..., None].expand_as(features)).unflatten(1, (-1, size)).flatten(0, 1)
        order = order.reshape(-1, size).gather(1, principal(nodes, 1)[..., 0].argsort(1)).view(order.shape)
        size //= 2
    return order


def slices(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """In 4 by the first feature, each of them in 4 by the second, and those by the third."""
    order = torch.arange(features.shape[1]).expand(features.shape[:2])
    for level in range(3):
        value = features[..., level].gather(1, order).unflatten(1, (4**level, -1))
        order = order.reshape(value.shape).gather(2, value.argsort(2)).flatten(1)
    return order


def hilbert(features: torch.Tensor, block_size: int, bits: int = 8) -> torch.Tensor:
    """Along the Hilbert curve through the ranks of the features: every axis in 2^bits parts of as many tokens."""
    ranks = features.argsort(1).argsort(1) * 2**bits // features.shape[1]
    return hilbert_index(ranks, bits).argsort(1)


def hilbert_index(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """Place on the curve of cells int64 [..., r], by Skilling's transform (AIP Conf. Proc. 707, 381, 2004): [...]."""
    x = list(cells.unbind(-1))
    for bit in reversed(range(1, bits)):
        low = 2**bit - 1
        for i in range(len(x)):
            high = (x[i] >> bit & 1).bool()
            swap = torch.where(high, 0, (x[0] ^ x[i]) & low)
            x[0], x[i] = x[0] ^ torch.where(high, low, swap), (x[i] if i else x[0] ^ torch.where(high, low, 0)) ^ swap
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((x[-1] >> bit & 1).bool(), turn ^ (2**bit - 1), turn)
    place = torch.zeros_like(turn)
    for bit in reversed(range(bits)):
        for axis in x:
            place = place * 2 + ((axis ^ turn) >> bit & 1)
    return place


def sort_by(rank: int, cut: Cut, space: Space = weighted) -> Callable[[AttentionCall, TokenLayout], Orders]:
    return partial(by_directions, cut=cut, rank=rank, space=space)


WAYS: dict[str, Way] = {
    "in space": Way(sort=in_space),
    IN_USE: Way(sort=by_content),
    "queries and keys each in their own order": Way(sort=apart),
    "keys only": Way(sort=keys_only),
    "without weights": Way(sort=sort_by(8, k_d, unweighted)),
    "exact directions": Way(sort=sort_by(8, k_d)),
    "cut across the widest direction": Way(sort=sort_by(8, across_widest), blocks=lambda n: n & (n - 1) == 0),
    "4 x 4 x 4 slices": Way(sort=sort_by(3, slices), blocks=lambda n: n == 64),
    "Hilbert curve through 3 directions": Way(sort=sort_by(3, hilbert)),
    "order of 2 steps earlier": Way(sort=by_content, back=2),
    "order of 4 steps earlier": Way(sort=by_content, back=4),
    "content, 4 directions": Way(sort=partial(by_content, DIRECTIONS=4)),
    "content, 16 directions": Way(sort=partial(by_content, DIRECTIONS=16)),
    "content, sample of 512": Way(sort=partial(by_content, SAMPLE=512)),
    "content, 40 rounds": Way(sort=partial(by_content, ROUNDS=40)),
}


def judge(
    call: AttentionCall, full: torch.Tensor, layout: TokenLayout, orders: Orders, configs: list[SparseConfig]
) -> list[tuple[float, float]]:
    """(captured, error) of Row under every config. full: full_attention(call); layout: in space."""
    tiled, (order_q, order_k) = layout.tiled, orders
    q, k, v = arrange(call.q, tiled, order_q), arrange(call.k, tiled, order_k), arrange(call.v, tiled, order_k)
    true = true_masses(replace(call, q=q, k=k, v=v), layout)
    start = layout.text if layout.text_first else 0
    video = slice(start, start + layout.video)
    found = []
    for config in configs:
        out, stats = rectified_attention(q, k, v, layout, config, text_mask=call.text_mask, return_stats=True)
        wrong = put_back(out, tiled, order_q)[:, video] - full[:, video]
        found.append((captured_mass(stats.block_mask[0], true), (wrong.norm() / full[:, video].norm()).item()))
    return found


def rows_of(
    pipe: Any, pair: Pair, settings: Settings, steps: list[int], names: list[str], configs: list[SparseConfig]
) -> list[Row]:
    wanted = {max(0, step - WAYS[name].back) for step in steps for name in names}
    calls = {step: capture_calls(pipe, pair, settings, step=step) for step in sorted(wanted)}
    found = defaultdict(list)
    for step, size in ((step, size) for step in steps for size in dict.fromkeys(each.block_size for each in configs)):
        some = [config for config in configs if config.block_size == size]
        for call in calls[step]:
            layout, full = call.layout(size), full_attention(call)
            for name in names:
                way = WAYS[name]
                if way.blocks(layout.num_blocks):
                    orders = way.sort(calls[max(0, step - way.back)][call.layer], layout)
                    for config, values in zip(some, judge(call, full, layout, orders, some), strict=True):
                        found[size, config.sparsity, name].append(values)
    return [
        Row(
            prompt=pair.prompt,
            seed=pair.seed,
            way=name,
            block_size=size,
            sparsity=sparsity,
            rectify=configs[0].rectify,
            **dict(zip(("captured", "error"), map(fmean, zip(*values, strict=True)), strict=True)),
        )
        for (size, sparsity, name), values in found.items()
    ]


def table(rows: list[Row]) -> str:
    lines = [
        f"| sort | block | sparsity | captured mass | error | less that of {IN_USE!r}, prompt by prompt |",
        "|---|---|---|---|---|---|",
    ]
    places: dict[tuple[int, float, str], list[Row]] = defaultdict(list)
    for row in rows:
        places[row.block_size, row.sparsity, row.way].append(row)
    for (size, sparsity, way), mine in sorted(places.items(), key=lambda item: item[0][:2]):
        cells = [bootstrap([row.captured for row in mine]).text(3), bootstrap([row.error for row in mine]).text(3)]
        in_use = places[size, sparsity, IN_USE]
        gaps = [row.error - other.error for row, other in zip(mine, in_use, strict=True)]
        cells.append("" if way == IN_USE else bootstrap(gaps).text(3, "+"))
        lines.append(f"| {way} | {size} | {sparsity:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(rows: list[Row], made_on: Machine) -> None:
    print(f"\n{len({row.prompt for row in rows})} prompts, seed 0, rectify {rows[0].rectify!r}; ", end="")
    print(f"{made_on.device}, torch {made_on.torch}; {made_on.command}")
    print("mean [95% interval of the mean, percentile bootstrap over the prompts]\n")
    print(table(rows))
    for size in dict.fromkeys(row.block_size for row in rows):
        out = [way for way in WAYS if way not in {row.way for row in rows if row.block_size == size}]
        print(f"\nNot measured at block size {size}: {', '.join(out) or 'nothing'}")


def _tokens(call: AttentionCall, layout: TokenLayout) -> torch.Tensor:
    """[q, k] of every tiled token, centred: [Z, n, 2D]."""
    both = torch.cat([call.q, call.k], dim=3)[:, layout.tiled].transpose(1, 2).flatten(0, 1)
    return both - both.mean(1, keepdim=True)


def _placed(order: torch.Tensor, call: AttentionCall, layout: TokenLayout) -> torch.Tensor:
    return layout.tiled[order].view(call.q.shape[0], call.q.shape[2], -1)


def _scale(call: AttentionCall) -> float:
    return call.q.shape[-1] ** -0.5


def main(
    prompts: int = 4,
    sparsity: Annotated[list[float] | None, typer.Option(show_default="0.9")] = None,
    block_size: Annotated[list[int] | None, typer.Option(show_default="64")] = None,
    step: Annotated[list[int] | None, typer.Option(help="Denoising steps of 12.", show_default="3 9")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Ways to sort; 'content' comes along.")] = None,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    out: Path = Path("runs/content-order"),
    table_of: Annotated[Path | None, typer.Option(help="Print the table of an earlier run; measure nothing.")] = None,
) -> None:
    if table_of is not None:
        show(*read_csv(table_of, Row))  # type: ignore[type-var]
        return
    unknown = set(only or ()) - set(WAYS)
    if unknown:
        raise typer.BadParameter(f"only: got {sorted(unknown)}; allowed: {', '.join(WAYS)}.")
    names = [name for name in WAYS if not only or name in only or name == IN_USE]
    configs = [
        SparseConfig(block_size=each, sparsity=part, rectify="row", order="gilbert", neighbours=False, top_p=0.0)
        for each in block_size or (64,)
        for part in sparsity or (0.9,)
    ]
    pipe = load_demo_pipeline("cpu")
    settings = Settings(height=size, width=size, num_frames=16, steps=STEPS)
    rows: list[Row] = []
    made_on = machine(torch.device("cpu"), shlex.join(["python", *sys.argv]))
    with Progress() as progress:
        for prompt in progress.track(PROMPTS[:prompts], description="prompts"):
            rows += rows_of(pipe, Pair(prompt=prompt, seed=0), settings, step or [3, 9], names, configs)
            write_csv(out / "content-order.csv", rows, made_on)  # a run that is stopped leaves what it measured
    show(rows, made_on)


if __name__ == "__main__":
    typer.run(main)
