"""Groups of queries and of keys, of any sizes: means, k-means, what is kept under a budget, and attention itself.

Attention goes query chunk by query chunk, so that a call of 100,000 tokens needs a few hundred MB a head.
"""

import math
from typing import NamedTuple

import torch

from .contract import Head

CHUNK = 16 * 2**20  # logits at once


class Groups(NamedTuple):
    """label: int64 [N], the group of every token; size: float32 [G]."""

    label: torch.Tensor
    size: torch.Tensor

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, D] -> [G, D]; zeros for an empty group."""
        total = x.new_zeros(len(self.size), x.shape[1]).index_add_(0, self.label, x)
        return total / self.size.clamp(min=1)[:, None]


class Tail(NamedTuple):
    """One pooled key [G, D], value [G, D] and logit bias [G] a key group, for the queries that drop it."""

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor


def groups_of(label: torch.Tensor, count: int) -> Groups:
    return Groups(label, torch.bincount(label, minlength=count).float())


def consecutive(order: torch.Tensor, size: int) -> Groups:
    """Every `size` tokens of an order make a group; the last may be smaller. order: int64 [N], a permutation."""
    label = torch.empty_like(order)
    label[order] = torch.arange(len(order), device=order.device) // size
    return groups_of(label, -(-len(order) // size))


def k_means(x: torch.Tensor, count: int, rounds: int) -> Groups:
    """Lloyd's algorithm from tokens spread evenly over x [N, D]. An empty cluster stays where it was."""
    centre = x[torch.linspace(0, len(x) - 1, count, device=x.device).long()]
    for _ in range(rounds):
        groups = groups_of(_nearest(x, centre), count)
        centre = torch.where(groups.size[:, None] > 0, groups.mean(x), centre)
    return groups_of(_nearest(x, centre), count)


def within(score: torch.Tensor, cost: torch.Tensor, room: float, least: bool = False) -> torch.Tensor:
    """bool [Gq, Gk]: what is kept where the highest scores come first, as far as their costs fit.

    least: every row keeps its highest score first. score, cost: [Gq, Gk].
    """
    if least:
        score = score.scatter(1, score.argmax(1, keepdim=True), math.inf)
    order = score.flatten().argsort(descending=True)
    spent = cost.flatten()[order].double().cumsum(0)
    kept = torch.zeros_like(score, dtype=torch.bool).flatten()
    kept[order[spent <= room]] = True
    return kept.view_as(score)


def attend(
    head: Head, rows: torch.Tensor, of_queries: torch.Tensor, of_keys: torch.Tensor, kept: torch.Tensor,
    tail: Tail | None = None,
) -> torch.Tensor:  # fmt: skip
    """[R, D]: softmax over the keys of kept groups, the tokens that stand alone and the pooled keys of dropped groups.

    rows: int64 [R], which queries; of_queries, of_keys: int64 [N], their groups; kept: bool [Gq, Gk].
    """
    alone, out = head.scale * head.k_alone.T, head.q.new_empty(len(rows), head.v.shape[1])
    values = torch.cat([head.v, head.v_alone] + ([] if tail is None else [tail.v]))
    for some in torch.arange(len(rows), device=rows.device).split(max(1, CHUNK // len(head.k))):
        q, keeps = head.q[rows[some]], kept[of_queries[rows[some]]]  # [C, D], [C, Gk]
        parts = [(head.scale * q @ head.k.T).masked_fill_(~keeps[:, of_keys], -math.inf), q @ alone]
        if tail is not None:
            parts.append((head.scale * q @ tail.k.T + tail.bias).masked_fill_(keeps, -math.inf))
        out[some] = torch.cat(parts, 1).softmax(1) @ values
    return out


def exact(head: Head, rows: torch.Tensor | None = None) -> torch.Tensor:
    """[R, D]: full attention, of all queries where rows are not named."""
    one = torch.zeros(len(head.q), dtype=torch.int64, device=head.q.device)
    rows = torch.arange(len(head.q), device=head.q.device) if rows is None else rows
    return attend(head, rows, one, one, torch.ones(1, 1, dtype=torch.bool, device=head.q.device))


def _nearest(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """int64 [N]"""
    half = centre.square().sum(1) / 2
    parts = x.split(max(1, CHUNK // len(centre)))
    return torch.cat([(some @ centre.T - half).argmax(1) for some in parts])
