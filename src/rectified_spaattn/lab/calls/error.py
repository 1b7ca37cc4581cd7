"""What one attention call loses by sparsity: the error of its output, and where its attention mass goes."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import SparseStats, rectified_attention
from ..config import SparseConfig
from ..layout import TokenLayout
from .capture import AttentionCall


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionError:
    """One call under one config.

    relative_error  |out - full| / |full| over all video tokens and heads (Frobenius norms); 0 is exact
    density         computed query-key pairs over all pairs
    stats           the plan of the call
    """

    relative_error: float
    density: float
    stats: SparseStats


def full_attention(call: AttentionCall) -> torch.Tensor:
    """Exact attention of every query to every valid key: [B, S, H, D]."""
    mask = _valid_keys(call)[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_error(
    call: AttentionCall, config: SparseConfig, *, full: torch.Tensor | None = None, backend: str = "auto"
) -> AttentionError:
    """Compare rectified_attention under `config` with full attention on the same q, k, v.

    full: what `full_attention(call)` gave, to compute it once for many configs. Raises as rectified_attention does.
    """
    layout = call.layout(config.block_size, config.order)
    full = full_attention(call) if full is None else full
    out, stats = rectified_attention(
        call.q, call.k, call.v, layout, config, text_mask=call.text_mask, backend=backend, return_stats=True
    )
    start = layout.text if layout.text_first else 0
    video = slice(start, start + layout.video)
    error = (out[:, video] - full[:, video]).norm() / full[:, video].norm()
    return AttentionError(relative_error=error.item(), density=stats.density, stats=stats)


def block_masses(
    call: AttentionCall, layout: TokenLayout, head: int, block_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact attention mass of batch 0 that the queries of every block give to every key block, on average.

    block_mask: bool [nb, nb], the only blocks the softmax runs over besides the isolated tokens; None: all, which is
    full attention. Returns float32 [nb, nb + 1] with rows of sum 1; the last column is all isolated tokens.
    """
    num_blocks, size = layout.num_blocks, layout.block_size
    valid = _valid_keys(call)[0]
    alone = layout.isolated[valid[layout.isolated]]
    keys = torch.cat([call.k[0, layout.tiled, head], call.k[0, alone, head]])
    queries = call.q[0, layout.tiled, head].view(num_blocks, size, -1)
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


def block_of_tokens(layout: TokenLayout) -> torch.Tensor:
    """int64 [S]: the block of every token, num_blocks for isolated ones, on the layout's device."""
    blocks = torch.full((layout.sequence,), layout.num_blocks, device=layout.tiled.device)
    blocks[layout.tiled] = torch.arange(layout.num_blocks, device=blocks.device).repeat_interleave(layout.block_size)
    return blocks


def misplaced(masses: torch.Tensor, full: torch.Tensor) -> float:
    """The share of attention mass that lies on the wrong blocks: half the L1 distance of two [nb, nb + 1] maps."""
    return ((masses - full).abs().sum(-1) / 2).mean().item()


def _valid_keys(call: AttentionCall) -> torch.Tensor:
    """bool [B, S]"""
    video = call.text_mask.new_ones(call.text_mask.shape[0], math.prod(call.grid))
    parts = [call.text_mask, video] if call.text_first else [video, call.text_mask]
    return torch.cat(parts, dim=1)
