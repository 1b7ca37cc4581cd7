"""SparsePR: k-means of queries and keys as the other side sees them, dropped clusters dropped, the rest repaired.

Queries are clustered by how far apart they put the keys' logits, keys by how far apart the queries see them; kept are
the pairs of clusters with the most error for their cost, as in SVG-EAR. PROBES queries are computed exactly, a ridge
regression of low rank from the sparse output to what it lacks is fitted to them, and added to every query.
"""

import torch

from .contract import Answer, Head, Pairs, Rule
from .groups import attend, exact, k_means, within
from .svg_ear import FIRST_ROUNDS, clusters, compensation_error, grouping

PROBES, RANK, RIDGE = 64, 16, 0.1  # published for HunyuanVideo


def sparsepr(head: Head, budget: float, *, repaired: bool = True) -> Answer:
    tokens, (count_q, count_k) = len(head.q), clusters(head)
    of_q = k_means(head.q @ root(head.k - head.k.mean(0)), count_q, FIRST_ROUNDS)
    of_k = k_means(head.k @ root(head.q), count_k, FIRST_ROUNDS)
    probes = float(min(PROBES, tokens) * head.all_pairs // tokens) if repaired else 0.0
    products = probes + (tokens * RANK if repaired else 0)
    estimates, cost = float(tokens * count_q), of_q.size[:, None] * of_k.size
    score = compensation_error(head, of_q.mean(head.q), of_k) / of_k.size.clamp(min=1)
    kept = within(score, cost, head.room(budget, estimates, products), least=True)
    rows = torch.arange(tokens, device=head.q.device)
    out = attend(head, rows, of_q.label, of_k.label, kept)
    if repaired:
        chosen = torch.linspace(0, tokens - 1, min(PROBES, tokens), device=head.q.device).long()
        chosen = of_q.label.argsort()[chosen]  # in every cluster as its size says
        full = exact(head, chosen)
        out = out + repair(out[chosen], full - out[chosen], out)
        out[chosen] = full
    pairs = (cost * kept).sum().item() + tokens * len(head.k_alone)
    return Answer(
        out=out, pairs=Pairs(exact=pairs, estimates=estimates, products=products, grouping=grouping(of_q, of_k))
    )


def root(x: torch.Tensor) -> torch.Tensor:
    """[D, D], the square root of the second moments of x [N, D]."""
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


def repair(seen: torch.Tensor, lacks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, D]: what x [N, D] lacks, by a ridge regression of lacks on seen [P, D], along RANK directions of lacks."""
    mean, spread = seen.mean(0), seen.std(0).clamp(min=1e-6)
    features, offset = (seen - mean) / spread, lacks.mean(0)
    gram = features.T @ features / len(seen)
    ridge = RIDGE * torch.eye(len(gram), device=gram.device)
    slope = torch.linalg.solve(gram + ridge, features.T @ (lacks - offset) / len(seen))
    main = torch.linalg.svd(lacks - offset, full_matrices=False).Vh[:RANK]
    return (x - mean) / spread @ slope @ main.T @ main + offset


RULES: dict[str, Rule] = {"sparsepr": sparsepr}
