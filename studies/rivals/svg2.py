"""SVG2 (arXiv 2505.18875): k-means of queries and of keys, clusters of most estimated mass kept, the rest dropped.

Mass is estimated from centroids and how many keys they stand for. The paper keeps clusters up to a share of the mass;
here the heaviest of the whole head fill the budget, at least one a query cluster.
"""

import torch

from .contract import Answer, Head, Pairs, Rule
from .groups import attend, k_means, within
from .svg_ear import FIRST_ROUNDS, clusters, grouping


def svg2(head: Head, budget: float) -> Answer:
    of_q, of_k = (k_means(x, count, FIRST_ROUNDS) for x, count in zip((head.q, head.k), clusters(head), strict=True))
    tokens, estimates = len(head.q), float(len(of_q.size) * len(of_k.size))
    mass = (head.scale * of_q.mean(head.q) @ of_k.mean(head.k).T + of_k.size.log()).softmax(1)
    cost = of_q.size[:, None] * of_k.size
    kept = within(mass, cost, head.room(budget, estimates), least=True)
    out = attend(head, torch.arange(tokens, device=head.q.device), of_q.label, of_k.label, kept)
    exact = (cost * kept).sum().item() + tokens * len(head.k_alone)
    return Answer(out=out, pairs=Pairs(exact=exact, estimates=estimates, grouping=grouping(of_q, of_k)))


RULES: dict[str, Rule] = {"svg2": svg2}
