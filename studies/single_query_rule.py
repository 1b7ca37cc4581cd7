"""Two stages that look at single queries and tokens, in PyTorch; single_queries.py says what they gain.

After the tree of order="content" pairs of blocks exchange tokens; and blocks are kept by what some queries of each give
them, where a mean query does not show where its queries look. single_query_kernels.py has both for a GPU.
"""

import math

import torch

from rectified_spaattn.method.arrange import lower_half, parted
from rectified_spaattn.method.pool import Pooled
from rectified_spaattn.method.tail import CAP

SAMPLED = 32  # queries of a block that are looked at
ROUNDS = 2  # in which pairs of blocks exchange tokens
STEPS = 2  # of one exchange


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
            left = lower_half((along - along.amin(2, keepdim=True)).view(torch.int32) >> 16)
        parts[:, first], parts[:, first + (1 << shift)] = parted(both, left).split(block_size, dim=2)
    return parts.flatten(1)


def sampled_rows(block_size: int) -> range:
    """Which queries of a block are looked at: all, or SAMPLED evenly spread ones."""
    step = max(1, block_size // SAMPLED)
    return range(step // 2, block_size, step)


def unsettled(
    q: torch.Tensor, pooled: Pooled, k_isolated: torch.Tensor, valid: torch.Tensor, scale: float
) -> torch.Tensor:
    """The root mean square over sampled queries i of block n of P_im σ_im, [B, H, nb, nb].

    P_i: the softmax of query i over pooled keys, with log b + min(½σ²_im, CAP), and isolated ones; σ²_im = scale² Σ_d
    q_id² Var_m,d. In place of P_nm σ_nm of the mean query it makes the residual of method.residual.

    q: [B, H, nb, b, D]; pooled: of method.pool, with a tail; k_isolated: [B, Hk, I, D]; valid: bool [B, I].
    """
    assert pooled.k_var is not None
    heads, size, result = q.shape[1], q.shape[3], pooled.q.new_empty(*q.shape[:3], q.shape[2])
    for h in range(heads):  # one head at a time, so that a long video needs no matrix of all
        of_k = h // (heads // pooled.k.shape[1])
        asked = scale * q[:, h, :, sampled_rows(size)].flatten(1, 2).to(pooled.q.dtype)  # [B, nb * sampled, D]
        half = 0.5 * asked.square() @ pooled.k_var[:, of_k].transpose(1, 2)  # ½σ²
        logits = asked @ pooled.k[:, of_k].transpose(1, 2) + half.clamp(max=CAP) + math.log(size)
        alone = asked @ k_isolated[:, of_k].to(asked.dtype).transpose(1, 2)
        total = torch.cat([logits, alone.masked_fill_(~valid[:, None], -math.inf)], 2).logsumexp(2, keepdim=True)
        square = logits.sub_(total).exp_().square_().mul_(2 * half)
        result[:, h] = square.unflatten(1, (q.shape[2], -1)).mean(2).sqrt_()
    return result
