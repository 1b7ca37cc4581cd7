"""What SVG-EAR's rule and this package's default differ in, one ingredient at a time, at equal executed pairs.

    python -m studies.ingredients --pairs 4 --step 6
    python -m studies.ingredients --table-of studies/data/ingredients.csv

A setting is three words. Groups: blocks of 64 in one order for queries and keys ("joint"), in an order of each
("apart"), the same with key blocks of 32 ("joint 32", "apart 32"), or k-means of each, 64 and 128 ("k-means").
Choice: by mass, by the residual that "row+slope" takes, to first order and from means ("residual"), or by the error
that centroids leave for the mean query, from all keys ("error"); the best of a head come first as far as the budget
goes. Tail: centroids ("mean"), with ½σ² ("variance"), or with the slope besides ("slope").
"""

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
from .rivals.groups import Groups, consecutive, exact, k_means, within
from .rivals.svg_ear import FIRST_ROUNDS, clusters, compensation_error

BLOCK = 64
SETTINGS = (
    "joint residual slope",  # the default, its budget spent to the last block
    "joint residual mean",
    "joint error mean",
    "joint error slope",
    "joint 32 residual slope",
    "joint 32 error mean",
    "apart residual slope",
    "apart error mean",
    "apart 32 residual slope",
    "apart 32 error mean",
    "k-means mass mean",
    "k-means residual mean",
    "k-means residual slope",
    "k-means error mean",  # SVG-EAR
    "k-means error variance",
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


def order_apart(x: torch.Tensor, other: torch.Tensor, scale: float, size: int) -> torch.Tensor:
    """int64 [N]: x [N, D] by a k-d tree over the 8 directions in which its products with `other` differ most."""
    places = torch.arange(len(x), device=x.device)
    some, others = (sample_of(each[None, :, None], places)[0] for each in (x, other))
    apart = some - some.mean(0)
    covariance, weigh = apart.T @ apart / len(some), scale**2 * (others.T @ others / len(others))
    to_x = principal(covariance[None], weigh[None])[0]
    seen = covariance @ to_x
    features = (x - some.mean(0)) @ (to_x * (seen * (weigh @ seen)).sum(0).sqrt())
    return k_d_order(features[None].to(torch.bfloat16), size)[0]


def groups(head: Head, name: str) -> tuple[Groups, Groups]:
    """Of queries and of keys."""
    if name == "k-means":
        of_q, of_k = clusters(head)
        return k_means(head.q, of_q, FIRST_ROUNDS), k_means(head.k, of_k, FIRST_ROUNDS)
    size = BLOCK // 2 if name.endswith("32") else BLOCK
    if name.startswith("joint"):
        both = (x[None, :, None] for x in (head.q, head.k))
        tiled = torch.arange(len(head.q), device=head.q.device)
        order = content_order(*both, tiled, block_size=size, scale=head.scale)[0, 0]
        return consecutive(order, BLOCK), consecutive(order, size)
    centred = head.k - head.k.mean(0)
    of_q = order_apart(head.q, centred, head.scale, BLOCK)
    return consecutive(of_q, BLOCK), consecutive(order_apart(head.k, head.q, head.scale, size), size)


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
        "mass": lambda: about.mass,
        "residual": lambda: about.mass * (2 * about.half_variance).sqrt() * about.moved,
        "error": lambda: compensation_error(head, of_q.mean(head.q), of_k),
    }[choice]() / of_k.size.clamp(min=1)
    choosing = {"mass": len(of_q.size) * len(of_k.size), "residual": 12 * tokens, "error": tokens * len(of_q.size)}
    sloping = tokens * dim if tail == "slope" else 0  # scale * q H and H; as ours.py counts them
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
    keeps = kept[of_q.label]  # [N, Gk]
    single = (head.scale * head.q @ head.k.T).masked_fill_(~keeps[:, of_k.label], -math.inf)
    pooled = (head.scale * head.q @ of_k.mean(head.k).T + bias[of_q.label]).masked_fill_(keeps, -math.inf)
    weights = torch.cat([single, head.scale * head.q @ head.k_alone.T, pooled], 1).softmax(1)
    out = weights @ torch.cat([head.v, head.v_alone, of_k.mean(head.v)])
    if tail == "slope":
        mass = (about.mass * about.half_variance.clamp(max=CAP).exp() * of_q.size[:, None]).masked_fill(kept, 0).sum(0)
        one = torch.einsum("m,mde->de", mass / mass.sum(), first_order(head, of_k))
        out += weights[:, -len(of_k.size) :].sum(1, keepdim=True) * (head.scale * head.q @ one)
    return out


def judge(calls: Sequence[AttentionCall], options: Options):
    for call in calls:
        for number in options.head or range(call.q.shape[2]):
            head = head_of(one_head(call, number, call.q.device))
            full, made = exact(head), {}
            for budget, setting in itertools.product(options.budget, options.parts):
                name, choice, tail = setting.rsplit(" ", 2)
                if name not in made:
                    both = groups(head, name)
                    made[name] = (*both, estimate(head, *both))
                out, share = answer(head, *made[name], choice, tail, budget)
                yield {"budget": budget, "parts": setting, "error": relative_error(out, full), "exact": share}


def ingredients(options: Options) -> None:
    """One ingredient at a time."""

    def show(rows: list[Any]) -> None:
        print(harness.table(rows, ("error", "exact"), {"parts": SETTINGS[0]}, ("error",)))

    harness.run("ingredients", Row, options, harness.on_calls(Row, options, lambda calls: judge(calls, options)), show)


if __name__ == "__main__":
    harness.main(Options, ingredients)
