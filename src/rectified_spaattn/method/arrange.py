"""Stage 0 of order="content": sort the tiled tokens of every head so that a block holds tokens that attend alike.

Not in the paper. Where block means stand for tokens, what counts is how far apart the logits of a block's keys lie, for
the queries there are, and those of its queries, for the keys there are; not how far apart they are on the screen.
"""

import math
from typing import NamedTuple

import torch

from .pool import stage_dtype

DIRECTIONS = 8  # in which tokens are told apart
SAMPLE = 2048  # tokens a head that the directions are found from
NODE_SAMPLE = 64  # tokens a node that its axis is chosen from
ROUNDS = 10  # of the subspace iteration, two products each


def content_order(
    q: torch.Tensor, k: torch.Tensor, tiled: torch.Tensor, *, block_size: int, scale: float
) -> torch.Tensor:
    """int64 [B, Hk, nb * b]: the tokens of `tiled` for every key head, block after block; one for queries and keys.

    q: [B, S, H, D]; k: [B, S, Hk, D]; any floating dtype; tiled: int64 [nb * b], places in the sequence, on their
    device. Queries that share a key head share its order: a token is where its mean query and its key are. The same
    tensors give the same order. Does not wait for the device.
    """
    batch, _, heads, dim = k.shape
    count = tiled.numel()
    if count <= block_size:
        return tiled.expand(batch, heads, count)
    both = moments(sample_of(q, tiled, q.shape[2] // heads), sample_of(k, tiled), scale)
    to_q, to_k = directions(both).split(dim, dim=1)
    q_mean, k_mean = both.mean.split(dim, dim=2)
    features = _project(q, tiled, q_mean, to_q, heads) + _project(k, tiled, k_mean, to_k, heads)
    features = features.nan_to_num(0.0).to(torch.bfloat16)  # as the kernel has them: 8 bits tell the sides of a cut
    return tiled[k_d_order(features, block_size)].view(batch, heads, count)


def sample_of(x: torch.Tensor, tiled: torch.Tensor, group: int = 1) -> torch.Tensor:
    """Some of the tiled tokens of x [B, S, H, D], evenly spread: [B * H / group, group * m, D], m at most SAMPLE."""
    some = tiled[:: -(-tiled.numel() // SAMPLE)]
    # contiguous: the same values give the same bits, however they lie in memory
    heads_first = x[:, some].transpose(1, 2).to(stage_dtype(x.dtype)).contiguous()
    return heads_first.view(-1, group * some.numel(), x.shape[3])


class Moments(NamedTuple):
    """Of [q, k], q the mean query of a token: mean [Z, 1, 2D], covariance [Z, 2D, 2D], and weigh [Z, 2D, 2D] =
    diag(M_k, M_q), the second moments of k (centred) and of all queries, times scale².
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    weigh: torch.Tensor


def moments(q: torch.Tensor, k: torch.Tensor, scale: float) -> Moments:
    """q: [Z, group * m, D]; k: [Z, m, D]"""
    count, dim = k.shape[1:]
    of_token = q.unflatten(1, (-1, count)).mean(1)
    q_mean, k_mean = of_token.mean(1, keepdim=True), k.mean(1, keepdim=True)
    apart = torch.cat([of_token - q_mean, k - k_mean], dim=2)
    covariance = apart.transpose(1, 2) @ apart / count
    weigh = torch.zeros_like(covariance)
    weigh[:, :dim, :dim] = covariance[:, dim:, dim:]
    weigh[:, dim:, dim:] = q.transpose(1, 2) @ q / q.shape[1]
    return Moments(torch.cat([q_mean, k_mean], dim=2), covariance, weigh.mul_(scale**2))


def start_directions(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[dim, r] to start the iteration from: numbers that look random, are always the same and come from no host."""
    i = torch.arange(dim * min(DIRECTIONS, dim), device=device)
    return ((7919 * i * i + 4729 * i) % 10007).to(dtype).view(dim, -1) / 10007 - 0.5


def directions(of: Moments) -> torch.Tensor:
    """W [Z, 2D, r], the first D rows for q: tokens whose [q, k] W are near get and give similar logits.

    Two keys differ, for the queries there are, by |M_q½ (k - k')|, M_q = scale² mean q qᵀ; two queries by
    |M_k½ (q - q')|, with centred keys, as no softmax sees what all keys share. W are the r principal directions of both
    together, as long as the deviation along them, by subspace iteration on S C, where S = diag(M_k, M_q) and C is the
    covariance of [q, k].
    """
    _, covariance, weigh = of
    step = weigh @ covariance
    step = step @ step
    w = start_directions(step.shape[1], step.dtype, step.device)
    little = 1e-5 * torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    for _ in range(ROUNDS):
        w = step @ w
        w = w / w.norm(dim=1, keepdim=True)
        gram = w.transpose(1, 2) @ covariance @ w
        gram = gram + little * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        triangle = torch.linalg.cholesky_ex(gram)[0]
        w = torch.linalg.solve_triangular(triangle, w.transpose(1, 2), upper=False).transpose(1, 2)
    seen = covariance @ w
    spread = (seen * (weigh @ seen)).sum(1, keepdim=True)  # the eigenvalue, where wᵀ C w = 1
    return w * spread.sqrt()


def k_d_order(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """int64 [Z, n]: the order in which a k-d tree with whole blocks as leaves visits its points.

    features: [Z, n, r], n a multiple of block_size. Every node is cut along the axis in which a sample of it varies
    most, at a whole number of blocks: the left child has half of what the smallest perfect tree has there. Equal values
    keep their order.
    """
    trees, count, rank = features.shape
    blocks = count // block_size
    flat = features.reshape(trees, count * rank)
    order = torch.arange(count, device=features.device).expand(trees, count)
    size = 2 ** math.ceil(math.log2(blocks))  # blocks a node
    while size > 1:
        nodes, tokens = -(-blocks // size), size * block_size
        order = torch.nn.functional.pad(order[:, :count], (0, nodes * tokens - count), value=count)
        order = order.view(trees, nodes, tokens)
        absent = order == count
        axis = _widest_axis(features, order, absent)  # [Z, nodes]
        at = order.clamp(max=count - 1).mul_(rank).add_(axis[:, :, None])
        value = flat.gather(1, at.flatten(1)).view_as(order).float().masked_fill_(absent, math.inf)
        order = parted(order, lower_half(value)).flatten(1)
        size //= 2
    return order[:, :count]


def _widest_axis(features: torch.Tensor, order: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """int64 [Z, nodes]: the axis of largest variance among some tokens of every node. order, absent: [Z, nodes, n]."""
    trees, nodes, tokens = order.shape
    taken = min(tokens, NODE_SAMPLE)
    some = torch.arange(taken, device=order.device) * tokens // taken
    index = order[:, :, some].clamp(max=features.shape[1] - 1)
    points = features.gather(1, index.flatten(1)[..., None].expand(-1, -1, features.shape[2]))
    points = points.view(trees, nodes, taken, -1).float()
    there = (~absent[:, :, some])[..., None].float()
    mean = (points * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
    return ((points - mean).square() * there).sum(2).argmax(-1)


def lower_half(value: torch.Tensor) -> torch.Tensor:
    """bool [Z, nodes, n]: the n/2 smallest values of every node, of equal ones the first."""
    half = value.shape[2] // 2
    edge = value.kthvalue(half, dim=2, keepdim=True).values
    below, equal = value < edge, value == edge
    return below | (equal & (equal.cumsum(2) <= half - below.sum(2, keepdim=True)))


def parted(order: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """order [Z, nodes, n] with the n/2 that are left first, otherwise as it was."""
    half, rank = order.shape[2] // 2, left.cumsum(2)
    place = torch.where(left, rank - 1, half - rank + torch.arange(2 * half, device=order.device))
    return torch.empty_like(order).scatter_(2, place, order)


def _project(x: torch.Tensor, tiled: torch.Tensor, mean: torch.Tensor, w: torch.Tensor, heads: int) -> torch.Tensor:
    """(x - mean) W: [Z, nb * b, r]. x: [B, S, H, D], of which the mean of every group counts; mean: [Z, 1, D]; w:
    [Z, D, r]; Z: B * heads.
    """
    of_token = x[:, tiled].to(w.dtype).unflatten(2, (heads, -1)).mean(3)  # [B, nb * b, heads, D]
    return of_token.transpose(1, 2).flatten(0, 1) @ w - mean @ w
