"""SVG-EAR (arXiv 2603.08982): k-means of queries and of keys, centroids for dropped clusters, chosen by their error.

A dropped key cluster joins every query's softmax as its centroid, counted as often as it has keys. Kept are the pairs
of clusters with the most error for their cost: how far the centroid's share is from that of the keys themselves, for
the mean query of the cluster.
"""

import torch

from .contract import Answer, Head, Pairs, Rule
from .groups import Groups, Tail, attend, k_means, within

FIRST_ROUNDS, WARM_ROUNDS = 25, 2  # of k-means: what this study runs from nothing; what a later denoising step takes


def svg_ear(head: Head, budget: float) -> Answer:
    of_q, of_k = (k_means(x, count, FIRST_ROUNDS) for x, count in zip((head.q, head.k), clusters(head), strict=True))
    tokens, pooled, estimates = len(head.q), float(len(head.q) * len(of_k.size)), float(len(head.q) * len(of_q.size))
    cost = of_q.size[:, None] * of_k.size
    score = compensation_error(head, of_q.mean(head.q), of_k) / of_k.size.clamp(min=1)
    kept = within(score, cost, head.room(budget, pooled, estimates))
    tail = Tail(of_k.mean(head.k), of_k.mean(head.v), of_k.size.log())
    out = attend(head, torch.arange(tokens, device=head.q.device), of_q.label, of_k.label, kept, tail)
    exact = (cost * kept).sum().item() + tokens * len(head.k_alone)
    return Answer(out=out, pairs=Pairs(exact=exact, pooled=pooled, estimates=estimates, grouping=grouping(of_q, of_k)))


def clusters(head: Head) -> tuple[int, int]:
    """Of queries and of keys: 300 and 1000, which are published for 720p, or fewer for short calls."""
    return min(300, max(1, len(head.q) // 64)), min(1000, max(1, len(head.k) // 32))


def grouping(of_q: Groups, of_k: Groups) -> float:
    """Distances of a warm k-means: each is half a pair."""
    return WARM_ROUNDS * len(of_q.label) * (len(of_q.size) + len(of_k.size)) / 2


def compensation_error(head: Head, q_mean: torch.Tensor, of_k: Groups) -> torch.Tensor:
    """[Gq, Gk]: |Σ_j p_j v_j - n p̄ v̄| over the keys of a cluster, p their shares of the mean query's softmax."""
    logits = head.scale * q_mean @ torch.cat([head.k, head.k_alone]).T
    share = (logits - logits.logsumexp(1, keepdim=True)).exp_()[:, : len(head.k)]  # [Gq, N]
    total = logits.logsumexp(1, keepdim=True)
    centroid = (head.scale * q_mean @ of_k.mean(head.k).T + of_k.size.log() - total).exp_()  # [Gq, Gk]
    v_mean, order = of_k.mean(head.v), of_k.label.argsort()
    error = torch.zeros_like(centroid)
    for m, keys in enumerate(order.split(of_k.size.long().tolist())):
        error[:, m] = (share[:, keys] @ head.v[keys] - centroid[:, m, None] * v_mean[m]).norm(dim=1)
    return error


RULES: dict[str, Rule] = {"svg-ear": svg_ear}
