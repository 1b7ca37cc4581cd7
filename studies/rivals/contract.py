"""What a rule gets and gives: one head of one call, a budget of executed pairs, an output, the pairs counted."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from rectified_spaattn.lab.calls.capture import AttentionCall


class NotPossible(ValueError):
    """The budget is smaller than what the rule always executes, or the call is not of a kind that it knows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """One head of one call, the tokens that can be tiled apart from those that stand alone (valid ones).

    q, k, v           float32 [N, D], in the model's order, of which `call.video` tells the places
    k_alone, v_alone  float32 [I, D]: text; every rule attends to them exactly, and their own queries are full
    call              the same head as lab.calls captured it, [1, S, 1, D]
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_alone: torch.Tensor
    v_alone: torch.Tensor
    call: AttentionCall

    @property
    def scale(self) -> float:
        return self.q.shape[1] ** -0.5

    @property
    def all_pairs(self) -> int:
        """N * (N + I): what full attention executes for the queries of tokens that can be tiled."""
        return len(self.q) * (len(self.k) + len(self.k_alone))

    def room(self, budget: float, *fixed: float) -> float:
        """Pairs that are left for exact groups where `budget`, a share of all pairs, also pays `fixed` and text.

        Raises NotPossible where nothing is.
        """
        always = sum(fixed) + len(self.q) * len(self.k_alone)
        if budget * self.all_pairs <= always:
            share = always / self.all_pairs
            raise NotPossible(f"budget: got {budget:g} of all pairs; allowed: above {share:.3g}, which the rule needs.")
        return budget * self.all_pairs - always


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Executed query-key pairs, or as much arithmetic: a pair is a product of queries with keys and one with values.

    exact      of single queries with single keys, text included
    pooled     of single queries with pooled keys, half a pair more where a query has a spread of its own
    estimates  to choose with: pooled or sampled queries with keys, pooled or single
    products   all other products with queries, keys or outputs: first-order terms, probe rows, repairs
    grouping   to find groups of tokens (sorting, one warm k-means); no part of `total`
    """

    exact: float
    pooled: float = 0.0
    estimates: float = 0.0
    products: float = 0.0
    grouping: float = 0.0

    @property
    def total(self) -> float:
        return self.exact + self.pooled + self.estimates + self.products

    def over(self, head: Head) -> dict[str, float]:
        """Shares of all pairs, `pairs` for the total."""
        shares = {name: value / head.all_pairs for name, value in asdict(self).items()}
        return {"pairs": self.total / head.all_pairs} | shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """out: float32 [N, D], for the queries of a Head; pairs: what it took."""

    out: torch.Tensor
    pairs: Pairs


Rule = Callable[[Head, float], Answer]  # budget: executed pairs over all_pairs


def head_of(call: AttentionCall) -> Head:
    """call: one head, [1, S, 1, D]; see `one_head` of lab.calls.maps."""
    q, k, v = (x[0, :, 0].float() for x in (call.q, call.k, call.v))
    alone = call.valid[0].clone()
    alone[call.video] = False
    return Head(q=q[call.video], k=k[call.video], v=v[call.video], k_alone=k[alone], v_alone=v[alone], call=call)


def relative_error(out: torch.Tensor, full: torch.Tensor) -> float:
    """|out - full| / |full|, Frobenius norms."""
    error = ((out - full).norm() / full.norm()).item()
    if not math.isfinite(error):
        raise RuntimeError("a rule's output is not finite: its groups leave a query without keys.")
    return error
