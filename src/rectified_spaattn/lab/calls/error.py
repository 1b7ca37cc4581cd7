"""What one attention call loses by sparsity: the error of its output, and where its attention mass goes."""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...attention import SparseStats
from ...config import SparseConfig
from ...orders import Blocks
from .capture import AttentionCall


class AttentionError(NamedTuple):
    """One call under one config: |out - full| / |full| over all video tokens and heads (Frobenius norms), 0 is exact;
    and its stats.
    """

    relative_error: float
    stats: SparseStats


def full_attention(call: AttentionCall) -> torch.Tensor:
    """Exact attention of every query to every valid key: [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    mask, grouped = call.valid[:, None, None, :], q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def attention_error(
    call: AttentionCall, config: SparseConfig, *, full: torch.Tensor | None = None, backend: str = "auto"
) -> AttentionError:
    """Compare rectified_attention under `config` with full attention on the same q, k, v.

    full: `full_attention(call)`, to compute it once for many configs. Raises as rectified_attention does.
    """
    full = full_attention(call) if full is None else full
    out, stats = call.sparse(config, backend=backend)
    error = (out - full)[:, call.video].norm() / full[:, call.video].norm()
    return AttentionError(error.item(), stats)


def block_masses(
    call: AttentionCall, blocks: Blocks, head: int, block_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact attention mass of batch 0 that the queries of every block give to every key block, on average.

    blocks: `call.blocks(config)`. block_mask: bool [nb, nb], the only blocks the softmax runs over besides the isolated
    tokens; None: all, which is full attention. Returns float32 [nb, nb + 1] with rows of sum 1; the last column is all
    isolated tokens.
    """
    num_blocks, size = blocks.num_blocks, blocks.block_size
    alone = blocks.isolated[call.valid[0, blocks.isolated]]
    of_k = head // (call.q.shape[2] // call.k.shape[2])
    keys = torch.cat([call.k[0, blocks.tiled, of_k], call.k[0, alone, of_k]])
    queries = call.q[0, blocks.tiled, head].view(num_blocks, size, -1)
    masses = keys.new_zeros(num_blocks, num_blocks + 1)
    for n in range(num_blocks):
        logits = queries[n] @ keys.T / math.sqrt(keys.shape[1])  # [b, keys]
        if block_mask is not None:
            dropped = ~block_mask[n].repeat_interleave(size)
            logits[:, : num_blocks * size].masked_fill_(dropped, -math.inf)
        weights = logits.softmax(-1).mean(0)
        masses[n, :num_blocks] = weights[: num_blocks * size].view(num_blocks, size).sum(1)
        masses[n, num_blocks] = weights[num_blocks * size :].sum()
    return masses


def block_of_tokens(blocks: Blocks) -> torch.Tensor:
    """int64 [S]: the block of every token, num_blocks for isolated ones, on the device of `blocks`."""
    block_of = torch.full((blocks.sequence,), blocks.num_blocks, device=blocks.tiled.device)
    block_of[blocks.tiled] = torch.arange(blocks.num_blocks, device=block_of.device).repeat_interleave(
        blocks.block_size
    )
    return block_of


def kept_mass(critical: torch.Tensor, full: torch.Tensor) -> float:
    """Full-attention mass on the critical blocks and the isolated tokens, mean over rows.

    critical: bool [..., nb, nb]; full: [..., nb, nb + 1].
    """
    return ((full[..., :-1] * critical).sum(-1) + full[..., -1]).mean().item()


def misplaced(masses: torch.Tensor, full: torch.Tensor) -> float:
    """The share of attention mass that lies on the wrong blocks: half the L1 distance of two [nb, nb + 1] maps."""
    return ((masses - full).abs().sum(-1) / 2).mean().item()
