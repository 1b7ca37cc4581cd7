"""What blocks of one size gain by looking at single queries, at equal executed pairs, beside clusters of any size.

    python -m studies.single_queries --pairs 4 --head 0 --head 2
    python -m studies.single_queries --table-of studies/data/single-queries.csv

A setting is three words: how queries and keys are grouped, by what groups are kept, and what stands for the rest.
Groups: "halved", blocks of 64 in one order for both, by the tree alone, as the package has them; "exchanged", with
exchanges between pairs of blocks after it, which it has not; "clusters", k-means of each, 64 of queries and 128 of
keys; "cluster-keys", exchanged blocks and clusters of keys; "pruned-keys", as many groups of keys as there are blocks,
of 16 keys and more, by cutting on in the tree where keys vary most. Kept by: the residual from means alone ("means", as
in "row+slope"), from sampled queries ("sampled", as in "query+slope"), or the error that pooled keys do leave ("true",
which no pairs pay for). Tail: ½σ² of the block's mean query ("mean"), of every query ("own"), or that with the slope
("slope").
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.maps import one_head
from rectified_spaattn.lab.option import option
from rectified_spaattn.method import arrange
from rectified_spaattn.method.residual import sampled_rows
from rectified_spaattn.method.tail import CAP

from . import harness, ingredients
from .ingredients import Estimate, estimate, one_softmax, sides
from .rivals.contract import Head, head_of, relative_error
from .rivals.groups import Groups, consecutive, exact, groups_of, k_means, within
from .rivals.svg_ear import FIRST_ROUNDS

ROUNDS = 2  # in which pairs of blocks exchange tokens
STEPS = 2  # of one exchange
SETTINGS = (
    "halved sampled slope",  # query+slope, its budget spent to the last block
    "exchanged sampled slope",
    "halved means mean",
    "halved sampled mean",
    "halved true own",
    "halved means own",
    "halved sampled own",
    "exchanged sampled own",
    "exchanged true own",
    "pruned-keys sampled own",
    "cluster-keys sampled own",
    "clusters means mean",
    "clusters sampled own",
)


@dataclass(frozen=True, kw_only=True)
class Options(ingredients.Options):
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)
    parts: tuple[str, ...] = option("Settings to compare.", SETTINGS, choices=SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Row(ingredients.Row):
    KEYS: ClassVar[tuple[str, ...]] = ("budget", "block_size", "parts")
    block_size: int


class Parts(NamedTuple):
    """Groups of queries and of keys of one head, and what means say of them."""

    q: Groups
    k: Groups
    about: Estimate


def grouped(head: Head, name: str, size: int) -> tuple[Groups, Groups]:
    """Of queries and of keys."""
    of_q, of_k = sides(head)
    if name == "clusters":
        return k_means(of_q.x, of_q.count, FIRST_ROUNDS), k_means(of_k.x, of_k.count, FIRST_ROUNDS)
    features = _features(head)
    order = arrange.k_d_order(features, size)
    if name != "halved":
        order = exchanged(features, order, size)
    blocks = consecutive(order[0], size)
    if name == "cluster-keys":
        return blocks, k_means(of_k.x, of_k.count, FIRST_ROUNDS)
    if name == "pruned-keys":
        return blocks, pruned(of_k.seen, arrange.k_d_order(features, 16)[0], len(blocks.size), 16)
    return blocks, blocks


def _features(head: Head) -> torch.Tensor:
    """bfloat16 [1, N, 8]: where order="content" sees the tokens."""
    q, k = (x[None, :, None] for x in (head.q, head.k))
    tokens = torch.arange(len(head.q), device=q.device)
    both = arrange.moments(arrange.sample_of(q, tokens), arrange.sample_of(k, tokens), head.scale)
    apart = torch.cat([head.q, head.k], 1) - both.mean[0]
    return (apart @ arrange.directions(both)[0])[None].to(torch.bfloat16)


def exchanged(features: torch.Tensor, order: torch.Tensor, block_size: int) -> torch.Tensor:
    """order [Z, n] with tokens exchanged between pairs of blocks, so that tokens of a block are nearer each other.

    The tree cuts along axes. Here two blocks are cut anew, across the line between their means, STEPS times: of their
    tokens those least along it go to the first, in the order they had. Pairs are neighbours at distance 1, 2, 4, ... .
    features: [Z, n, r].
    """
    trees, count, rank = features.shape
    blocks = count // block_size
    parts = order.view(trees, blocks, block_size).clone()
    for shift in list(range((blocks - 1).bit_length())) * ROUNDS:
        first = torch.arange(blocks, device=order.device)
        first = first[(first & (1 << shift) == 0) & (first + (1 << shift) < blocks)]
        both = torch.cat([parts[:, first], parts[:, first + (1 << shift)]], dim=2)  # [Z, pairs, 2b]
        at = both.flatten(1)[..., None].expand(-1, -1, rank)
        points = features.gather(1, at).view(*both.shape, rank).float()
        left = (torch.arange(2 * block_size, device=order.device) < block_size).expand_as(both)
        for _ in range(STEPS):
            line = (1 - 2 * left.float())[:, :, None] @ points  # [Z, pairs, 1, r], from the one mean to the other
            along = (points @ line.transpose(2, 3))[..., 0]
            # floats of 0 and more are ordered as their bits are, and the upper ones tell the sides of a cut
            left = arrange.lower_half((along - along.amin(2, keepdim=True)).view(torch.int32) >> 16)
        parts[:, first], parts[:, first + (1 << shift)] = arrange.parted(both, left).split(block_size, dim=2)
    return parts.flatten(1)


def pruned(x: torch.Tensor, order: torch.Tensor, count: int, grain: int) -> Groups:
    """`count` groups: spans of an order [N], halved where x [N, r] varies most in sum, down to `grain` tokens."""
    x = x[order]

    def item(first: int, last: int) -> tuple[float, int, int]:
        return -(x[first:last] - x[first:last].mean(0)).square().sum().item(), first, last

    leaves, open_leaves = [], [item(0, len(x))]
    while open_leaves and len(leaves) + len(open_leaves) < count:
        _, first, last = heapq.heappop(open_leaves)
        if last - first < 2 * grain:
            leaves.append((first, last))
            continue
        middle = (first + last) // 2
        for span in ((first, middle), (middle, last)):
            heapq.heappush(open_leaves, item(*span))
    label = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for number, (first, last) in enumerate(leaves + [span for _, *span in open_leaves]):
        label[order[first:last]] = number
    return groups_of(label, count)


def half_variances(head: Head, of_k: Groups) -> torch.Tensor:
    """½σ² of every query and group of keys, [N, Gk]."""
    variance = (of_k.mean(head.k.square()) - of_k.mean(head.k).square()).clamp(min=0)
    return 0.5 * (head.scale * head.q).square() @ variance.T


def sampled(head: Head, parts: Parts, size: int) -> torch.Tensor:
    """The residual from some queries of every group: [Gq, Gk]."""
    half = half_variances(head, parts.k)
    logits = head.scale * head.q @ parts.k.mean(head.k).T + parts.k.size.log() + half.clamp(max=CAP)
    total = torch.cat([logits, head.scale * head.q @ head.k_alone.T], 1).logsumexp(1, keepdim=True)
    order = parts.q.label.argsort(stable=True)
    first = parts.q.size.cumsum(0) - parts.q.size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first.long()[parts.q.label[order]]
    seen = place % sampled_rows(size).step == 0
    some = groups_of(parts.q.label[seen], len(parts.q.size))
    square = ((logits - total).exp().square() * 2 * half)[seen]
    return some.mean(square).sqrt() * parts.about.moved


def true_error(head: Head, parts: Parts) -> torch.Tensor:
    """What a pooled key for a group of keys gets wrong, root mean square over the queries of a group: [Gq, Gk]."""
    logits = head.scale * head.q @ torch.cat([head.k, head.k_alone]).T
    total = logits.logsumexp(1, keepdim=True)
    share = (logits - total).exp()[:, : len(head.k)]
    bias = parts.k.size.log() + half_variances(head, parts.k).clamp(max=CAP)
    pooled = (head.scale * head.q @ parts.k.mean(head.k).T + bias - total).exp()
    v_mean, columns = parts.k.mean(head.v), []
    for m, keys in enumerate(parts.k.label.argsort().split(parts.k.size.long().tolist())):
        columns.append((share[:, keys] @ head.v[keys] - pooled[:, m, None] * v_mean[m]).square().sum(1))
    return parts.q.mean(torch.stack(columns, 1)).sqrt()


def answer(head: Head, parts: Parts, choice: str, tail: str, budget: float, size: int) -> tuple[torch.Tensor, float]:
    """The output [N, D] and the share of all pairs that single keys took."""
    (tokens, dim), (of_q, of_k, about) = head.q.shape, parts
    looked = tokens / sampled_rows(size).step * (len(of_k.size) + len(head.k_alone))
    score, choosing = {
        "means": lambda: (about.mass * (2 * about.half_variance).sqrt() * about.moved, 12.0 * tokens),
        "sampled": lambda: (sampled(head, parts, size), 12 * tokens + looked),
        "true": lambda: (true_error(head, parts), 0.0),
    }[choice]()
    # a product with values is left out where a query meets variances: half a pair
    pooling = tokens * len(of_k.size) * (1 if tail == "mean" else 1.5)
    cost = of_q.size[:, None] * of_k.size
    room = head.room(budget, pooling, choosing, tokens * dim if tail == "slope" else 0)
    kept = within(score / of_k.size.clamp(min=1), cost, room)
    return attended(head, parts, kept, tail), ((cost * kept).sum().item() + tokens * len(head.k_alone)) / head.all_pairs


def attended(head: Head, parts: Parts, kept: torch.Tensor, tail: str) -> torch.Tensor:
    """[N, D]: one softmax over kept keys, those that stand alone and a pooled key of every dropped group."""
    of_q, of_k, about = parts
    half = about.half_variance[of_q.label] if tail == "mean" else half_variances(head, of_k)
    pooled = head.scale * head.q @ of_k.mean(head.k).T + of_k.size.log() + half.clamp(max=CAP)
    return one_softmax(head, of_q, of_k, kept, pooled, about.mass if tail == "slope" else None)


def judge(calls: Sequence[AttentionCall], options: Options):
    for call in calls:
        for number in options.head or range(call.q.shape[2]):
            head, size, made = head_of(one_head(call, number, call.q.device)), options.block_size, {}
            full = exact(head)
            for budget, setting in itertools.product(options.budget, options.parts):
                name, choice, tail = setting.split()
                if name not in made:
                    found = grouped(head, name, size)
                    made[name] = Parts(*found, estimate(head, *found))
                out, share = answer(head, made[name], choice, tail, budget, size)
                row = {"budget": budget, "block_size": size, "parts": setting}
                yield row | {"error": relative_error(out, full), "exact": share}


def single_queries(options: Options) -> None:
    """Blocks of one size, looked at by single queries."""

    def show(rows: list[Any]) -> None:
        print(harness.table(rows, ("error", "exact"), {"parts": SETTINGS[0]}, ("error",)))

    measure = harness.on_calls(Row, options, lambda calls: judge(calls, options))
    harness.run("single_queries", Row, options, measure, show)


if __name__ == "__main__":
    harness.main(Options, single_queries)
