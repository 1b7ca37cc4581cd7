"""How much more the rank with most pairs computes in a call than the mean rank, and what dealing heads out does.

    OMP_NUM_THREADS=1 python -m studies.rank_balance --pairs 4

The demo model has few heads a layer. A model of 24 is made up from them: each of its heads is one of a layer's, drawn
at random, so that it has their spread, and no order. "skewed" is the worst order there is: heads sorted by what they
compute. Heads are dealt out by what they computed two denoising steps before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.density import density
from rectified_spaattn.pipelines.balance import dealt_out

from . import harness

_DRAWS, _HEADS = 50, 24


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    step: tuple[int, ...] = option("Denoising steps whose attention calls are taken, from 0.", (1, 3, 5, 7, 9))
    top_p: tuple[float, ...] = option("Least attention mass that kept blocks hold.", (0.0, 0.3, 0.5, 0.7, 0.9))
    ranks: tuple[int, ...] = option("Processes that share the model.", (2, 4, 8))
    block_size: int = option("Tokens a block.", 64)
    rectify: str = option("The mode.", "row")


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair. density: of a call; in_order, skewed, dealt: by how much the rank with most
    pairs exceeds the mean rank, for heads in random order, for sorted ones, and dealt out.
    """

    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "top_p", "ranks")
    sparsity: float
    top_p: float
    ranks: int
    density: float
    in_order: float
    skewed: float
    dealt: float


def excess(work: torch.Tensor, ranks: int) -> float:
    """work: [draws, heads], in the order in which ranks have them."""
    of_rank = work.unflatten(1, (ranks, -1)).sum(2)
    return float((of_rank.amax(1) / of_rank.mean(1)).mean()) - 1


def of_heads(call: AttentionCall, config: SparseConfig) -> torch.Tensor:
    """float32 [H]: what each head of a call computes."""
    mask = call.sparse(config)[1].block_mask
    heads = range(mask.shape[1])
    return torch.stack([density(mask[:, h : h + 1], call.layout, config, call.text_mask) for h in heads])


def rank_balance(options: Options) -> None:
    """What a rank may have to do more than others."""

    def judge(calls: Sequence[AttentionCall]) -> Iterator[Mapping[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        base = SparseConfig(rectify=options.rectify, block_size=options.block_size)  # type: ignore[arg-type]
        for sparsity in options.sparsity:
            for top_p in options.top_p:
                config = base.replace(sparsity=sparsity, top_p=top_p)
                work = {(call.layer, call.step): of_heads(call, config) for call in calls}
                for (layer, step), now in work.items():
                    before = work.get((layer, step - 2))
                    if before is None:
                        continue
                    drawn = torch.randint(len(now), (_DRAWS, _HEADS), generator=generator)
                    for ranks in options.ranks:
                        heads = dealt_out(before[drawn], ranks)[:, 0]
                        yield {
                            "sparsity": sparsity,
                            "top_p": top_p,
                            "ranks": ranks,
                            "density": float(now.mean()),
                            "in_order": excess(now[drawn], ranks),
                            "skewed": excess(now[drawn].sort(dim=1).values, ranks),
                            "dealt": excess(now[drawn].gather(1, heads), ranks),
                        }

    def show(rows: list[Row]) -> None:
        print(harness.table(rows, ("density", "in_order", "skewed", "dealt")))

    harness.run("rank_balance", Row, options, harness.on_calls(Row, options, judge), show)


if __name__ == "__main__":
    harness.main(Options, rank_balance)
