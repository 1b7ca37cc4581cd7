"""What SVG-EAR's rule and "row+slope" differ in, one ingredient at a time, at equal executed pairs.

    python -m studies.ingredients --pairs 4 --step 6
    python -m studies.ingredients --table-of studies/data/ingredients.csv

A setting is four words: how queries are grouped, how keys are, by what groups are kept, and what stands for the rest.
Groups: "joint" blocks of 64 or 32, in one order for queries and keys; "own" blocks, in an order of each; "k-means" of
each, 64 of queries and 128 of keys; "weighed", the same in the 8 directions that the own order has; "cut", k-means
clusters put one behind the other and cut into blocks; "tree16", as many groups as k-means has, by a tree in those
directions that cuts where it leaves the least variance, at a multiple of 16 tokens. Choice: by the residual that
"row+slope" takes, to first order and from means, or by the error that centroids leave for the mean query, from all
keys; the best of a head come first as far as the budget goes. Tail: centroids ("mean"), with ½σ² ("variance"), or with
the slope besides ("slope").
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.maps import one_head
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.arrange import content_order, k_d_order, sample_of
from rectified_spaattn.method.residual import principal
from rectified_spaattn.method.tail import CAP

from . import harness
from .rivals.contract import Head, head_of, relative_error
from .rivals.groups import Groups, consecutive, exact, groups_of, k_means, within
from .rivals.svg_ear import FIRST_ROUNDS, clusters, compensation_error

SETTINGS = (
    "joint64 joint64 residual slope",  # row+slope, its budget spent to the last block
    "joint64 joint64 error mean",
    "joint64 joint32 residual slope",
    "own64 own64 residual slope",
    "own64 own32 residual slope",
    "cut64 cut32 residual slope",
    "own64 k-means residual variance",
    "own64 tree16 residual variance",
    "tree16 tree16 residual variance",
    "weighed weighed residual variance",
    "k-means k-means error mean",  # SVG-EAR
    "k-means k-means residual mean",
    "k-means k-means residual variance",
    "k-means k-means residual slope",
)


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    step: tuple[int, ...] = option("Denoising steps whose attention calls are taken, from 0.", (6,))
    head: tuple[int, ...] = option("Heads that are looked at.", (), unset="all")
    budget: tuple[float, ...] = option("Executed pairs over all pairs.", (0.115,))
    parts: tuple[str, ...] = option("Settings to compare.", SETTINGS, choices=SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the heads and calls of one pair. exact: the share of all pairs that single keys took."""

    KEYS: ClassVar[tuple[str, ...]] = ("budget", "parts")
    budget: float
    parts: str
    error: float
    exact: float


class Estimate(NamedTuple):
    """[Gq, Gk] each: mass, the softmax of the mean query; half_variance, ½σ²; moved, |scale * q H_m|, the root mean
    square over the queries of the group.
    """

    mass: torch.Tensor
    half_variance: torch.Tensor
    moved: torch.Tensor


class Side(NamedTuple):
    """x: the queries or the keys of a head, [N, D]; seen: them in 8 directions, [N, 8]; count: clusters of k-means."""

    x: torch.Tensor
    seen: torch.Tensor
    count: int


def sides(head: Head) -> tuple[Side, Side]:
    """Of queries and of keys."""
    of_q, of_k = clusters(head)
    q_seen = directions(head.q, head.k - head.k.mean(0), head.scale)
    return Side(head.q, q_seen, of_q), Side(head.k, directions(head.k, head.q, head.scale), of_k)


def directions(x: torch.Tensor, other: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, 8]: x [N, D] in the directions in which its products with `other` differ most, as long as they differ."""
    places = torch.arange(len(x), device=x.device)
    some, others = (sample_of(each[None, :, None], places)[0] for each in (x, other))
    apart = some - some.mean(0)
    covariance, weigh = apart.T @ apart / len(some), scale**2 * (others.T @ others / len(others))
    to_x = principal(covariance[None], weigh[None])[0]
    seen = covariance @ to_x
    return (x - some.mean(0)) @ (to_x * (seen * (weigh @ seen)).sum(0).sqrt())


def groups(head: Head, side: Side, name: str) -> Groups:
    """Of one side."""
    if name == "k-means":
        return k_means(side.x, side.count, FIRST_ROUNDS)
    if name == "weighed":
        return k_means(side.seen, side.count, FIRST_ROUNDS)
    kind, size = name[:-2], int(name[-2:])
    if kind == "tree":
        return tree(side.seen, side.count, size)
    if kind == "own":
        return consecutive(k_d_order(side.seen[None].to(torch.bfloat16), size)[0], size)
    if kind == "cut":
        found = k_means(side.x, side.count, FIRST_ROUNDS)
        place = k_d_order(found.mean(side.seen)[None], 1)[0].argsort()  # of every cluster
        return consecutive(place[found.label].argsort(stable=True), size)
    both, tiled = (x[None, :, None] for x in (head.q, head.k)), torch.arange(len(head.q), device=head.q.device)
    return consecutive(content_order(*both, tiled, block_size=size, scale=head.scale)[0, 0], size)


def tree(x: torch.Tensor, count: int, grain: int) -> Groups:
    """`count` groups of x [N, D], of any sizes that are multiples of `grain`, or fewer.

    What varies most in sum is cut next, along its widest axis, where the two parts vary least in sum.
    """
    leaves, open_leaves = [], [(-math.inf, 0, torch.arange(len(x), device=x.device))]
    while open_leaves and len(leaves) + len(open_leaves) < count:
        *_, places = heapq.heappop(open_leaves)
        if len(places) < 2 * grain:
            leaves.append(places)
            continue
        for part in cut(x, places, grain):
            total = (x[part] - x[part].mean(0)).square().sum().item()
            heapq.heappush(open_leaves, (-total, int(part[0]), part))
    leaves += [places for *_, places in open_leaves]
    label = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for number, places in enumerate(leaves):
        label[places] = number
    return groups_of(label, len(leaves))


def cut(x: torch.Tensor, places: torch.Tensor, grain: int) -> tuple[torch.Tensor, torch.Tensor]:
    """places [n] in two, both sorted along the axis in which x varies most there."""
    axis = x[places].var(0).argmax()
    places = places[x[places, axis].argsort(stable=True)]
    apart = (x[places] - x[places].mean(0)).double()
    size = torch.arange(1, len(places), device=x.device)
    left = apart.cumsum(0)[:-1]
    kept = left.square().sum(1) / size + left.square().sum(1) / (len(places) - size)  # what the cut takes from the sum
    at = grain * int(kept[grain - 1 :: grain].argmax() + 1)
    return places[:at], places[at:]


def estimate(head: Head, of_q: Groups, of_k: Groups) -> Estimate:
    """From means and second moments of both groups."""
    q_mean, k_mean, scale = of_q.mean(head.q), of_k.mean(head.k), head.scale
    logits = torch.cat([scale * q_mean @ k_mean.T + of_k.size.log(), scale * q_mean @ head.k_alone.T], 1)
    variance = (of_k.mean(head.k.square()) - k_mean.square()).clamp(min=0)
    follow = first_order(head, of_k)
    looks = of_q.mean((head.q[:, :, None] * head.q[:, None]).flatten(1))  # mean q qᵀ
    moved = looks @ (follow @ follow.transpose(1, 2)).flatten(1).T
    return Estimate(
        mass=logits.softmax(1)[:, : len(of_k.size)],
        half_variance=0.5 * scale**2 * q_mean.square() @ variance.T,
        moved=scale * moved.clamp(min=0).sqrt(),
    )


def first_order(head: Head, of_k: Groups) -> torch.Tensor:
    """H_m = mean (k - k̄)ᵀ(v - v̄) of every group: [Gk, D, D]."""
    products = of_k.mean((head.k[:, :, None] * head.v[:, None]).flatten(1)).view(-1, *(head.k.shape[1],) * 2)
    return products - of_k.mean(head.k)[:, :, None] * of_k.mean(head.v)[:, None]


def answer(
    head: Head, of_q: Groups, of_k: Groups, about: Estimate, choice: str, tail: str, budget: float
) -> tuple[torch.Tensor, float]:
    """The output [N, D] and the share of all pairs that single keys took."""
    tokens, dim = head.q.shape
    cost = of_q.size[:, None] * of_k.size
    score = {
        "residual": lambda: about.mass * (2 * about.half_variance).sqrt() * about.moved,
        "error": lambda: compensation_error(head, of_q.mean(head.q), of_k),
    }[choice]() / of_k.size.clamp(min=1)
    choosing = {"residual": 12 * tokens, "error": tokens * len(of_q.size)}  # as ours.py and svg_ear.py count it
    sloping = tokens * dim if tail == "slope" else 0  # scale * q H and H, as ours.py counts them
    kept = within(score, cost, head.room(budget, tokens * len(of_k.size), choosing[choice], sloping))
    out = attended(head, of_q, of_k, kept, about, tail)
    return out, ((cost * kept).sum().item() + tokens * len(head.k_alone)) / head.all_pairs


def attended(
    head: Head, of_q: Groups, of_k: Groups, kept: torch.Tensor, about: Estimate, tail: str
) -> torch.Tensor:  # fmt: skip
    """[N, D]: one softmax over kept keys, those that stand alone and a pooled key of every dropped group."""
    bias = of_k.size.log().expand_as(kept)
    if tail != "mean":
        bias = bias + about.half_variance.clamp(max=CAP)
    pooled = head.scale * head.q @ of_k.mean(head.k).T + bias[of_q.label]
    mass = about.mass * about.half_variance.clamp(max=CAP).exp() if tail == "slope" else None
    return one_softmax(head, of_q, of_k, kept, pooled, mass)


def one_softmax(
    head: Head, of_q: Groups, of_k: Groups, kept: torch.Tensor, pooled: torch.Tensor, mass: torch.Tensor | None
) -> torch.Tensor:
    """[N, D]: attention to kept keys, those that stand alone and a pooled key of every dropped group.

    pooled: logits of the pooled keys [N, Gk], used up; mass: [Gq, Gk], by which dropped groups of keys weigh in the
    slope, None for none.
    """
    keeps = kept[of_q.label]  # [N, Gk]
    single = (head.scale * head.q @ head.k.T).masked_fill_(~keeps[:, of_k.label], -math.inf)
    logits = [single, head.scale * head.q @ head.k_alone.T, pooled.masked_fill_(keeps, -math.inf)]
    weights = torch.cat(logits, 1).softmax(1)
    out = weights @ torch.cat([head.v, head.v_alone, of_k.mean(head.v)])
    if mass is not None:
        total = (mass * of_q.size[:, None]).masked_fill(kept, 0).sum(0)
        one = torch.einsum("m,mde->de", total / total.sum(), first_order(head, of_k))
        out += weights[:, -len(of_k.size) :].sum(1, keepdim=True) * (head.scale * head.q @ one)
    return out


def judge(calls: Sequence[AttentionCall], options: Options):
    for call in calls:
        for number in options.head or range(call.q.shape[2]):
            head = head_of(one_head(call, number, call.q.device))
            full, both, made = exact(head), sides(head), {}
            for budget, setting in itertools.product(options.budget, options.parts):
                *names, choice, tail = setting.split()
                for side, name in enumerate(names):
                    if (side, name) not in made:
                        made[side, name] = groups(head, both[side], name)
                found = [made[key] for key in enumerate(names)]
                out, share = answer(head, *found, estimate(head, *found), choice, tail, budget)
                yield {"budget": budget, "parts": setting, "error": relative_error(out, full), "exact": share}


def ingredients(options: Options) -> None:
    """One ingredient at a time."""

    def show(rows: list[Any]) -> None:
        print(harness.table(rows, ("error", "exact"), {"parts": SETTINGS[0]}, ("error",)))

    harness.run("ingredients", Row, options, harness.on_calls(Row, options, lambda calls: judge(calls, options)), show)


if __name__ == "__main__":
    harness.main(Options, ingredients)
