"""Stage 6 with PyTorch alone: gather the kept keys of a few query blocks at a time and call SDPA on them."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan, make_plan

# Gathered keys and values of one SDPA call: small enough for a CPU's cache, large enough to be worth a GPU's launch.
_CHUNK_BYTES_CPU = 4 << 20
_CHUNK_BYTES = 512 << 20


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
    block_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, Plan]:
    """q, k, v: [B, S, H, D]; text_valid: bool [B, text]; block_mask: bool [B, H, nb, nb] or None.

    Returns out [B, S, H, D] and the plan. Raises ValueError where a query block is left without any key.
    """
    layout = layout.on(q.device)
    batch, _, heads, head_dim = q.shape
    q_tiled, k_tiled, v_tiled = (_take(x, layout.tiled).unflatten(2, (-1, layout.block_size)) for x in (q, k, v))
    q_alone, k_alone, v_alone = (_take(x, layout.isolated) for x in (q, k, v))
    leftover = text_valid.new_ones(batch, layout.leftover)
    valid = torch.cat([leftover, text_valid], dim=1)  # [B, I]

    plan = make_plan(q_tiled, k_tiled, v_tiled, k_alone, valid, layout, config, scale, block_mask)
    _require_keys(plan.block_mask, valid)
    attended = torch.empty_like(q_tiled)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for i in range(batch):
        keep = valid[i].nonzero().squeeze(1)
        k_all = _append(k_tiled[i], k_alone[i].index_select(1, keep))
        v_all = _append(v_tiled[i], v_alone[i].index_select(1, keep))
        _attend(q_tiled[i], k_all, v_all, plan.block_mask[i], len(keep), scale, attended[i])
        if q_alone.shape[2]:
            length = layout.num_blocks * layout.block_size + len(keep)
            k_row, v_row = (x.flatten(1, 2)[None, :, :length] for x in (k_all, v_all))
            dense = scaled_dot_product_attention(q_alone[i : i + 1], k_row, v_row, scale=scale)
            out[i].index_copy_(0, layout.isolated, dense[0].transpose(0, 1))
    for h in range(heads):  # head by head, so that the float32 products stay small
        rectified = attended[:, h] * plan.r[:, h, :, None, None] + plan.c[:, h, :, None, :]
        out[:, :, h].index_copy_(1, layout.tiled, rectified.to(q.dtype).view(batch, -1, head_dim))
    return out, plan


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    # [B, S, H, D] -> [B, H, places, D], contiguous
    return x.index_select(1, places).transpose(1, 2).contiguous()


def _append(tiled: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """[H, nb, b, D] and [H, I, D] -> [H, nb + ceil(I / b), b, D]; what fills the last block is never read."""
    heads, num_blocks, block_size, head_dim = tiled.shape
    extra = -(-alone.shape[1] // block_size)
    both = tiled.new_empty(heads, num_blocks + extra, block_size, head_dim)
    both[:, :num_blocks] = tiled
    both.view(heads, -1, head_dim)[:, num_blocks * block_size : num_blocks * block_size + alone.shape[1]] = alone
    return both


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    isolated: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Query blocks with equally many critical blocks share SDPA calls, so nothing is padded or masked.

    q, out: [H, nb, b, D]; k, v: [H, nb + e, b, D] with `isolated` valid tokens in the last e blocks; block_mask: bool
    [H, nb, nb].
    """
    heads, num_blocks, block_size, head_dim = q.shape
    stored = k.shape[1]
    q, k, v, out = (x.flatten(0, 1) for x in (q, k, v, out))  # views: all four are contiguous

    rows, columns = block_mask.flatten(0, 1).nonzero(as_tuple=True)
    blocks = rows // num_blocks * stored + columns  # index into k and v, sorted by row
    counts = torch.bincount(rows, minlength=heads * num_blocks)
    starts = counts.cumsum(0) - counts
    tail = torch.arange(num_blocks, stored, device=q.device)
    budget = _CHUNK_BYTES_CPU if q.device.type == "cpu" else _CHUNK_BYTES
    for count in counts.unique().tolist():
        same = (counts == count).nonzero().squeeze(1)
        length = count * block_size + isolated
        at_once = max(1, budget // (2 * k.element_size() * head_dim * max(1, length)))
        for row in same.split(at_once):
            critical = blocks[starts[row, None] + torch.arange(count, device=q.device)]
            alone = row[:, None] // num_blocks * stored + tail
            index = torch.cat([critical, alone], dim=1)
            k_kept, v_kept = (_gather(x, index)[:, :, :length] for x in (k, v))
            out[row] = scaled_dot_product_attention(q[row, None], k_kept, v_kept, scale=scale)[:, 0]


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # [blocks, b, D] at [rows, n] -> [rows, 1, n * b, D]
    return x.index_select(0, index.flatten()).view(index.shape[0], 1, -1, x.shape[-1])


def _require_keys(block_mask: torch.Tensor, valid: torch.Tensor) -> None:
    lonely = ~block_mask.any(-1) & ~valid.any(1)[:, None, None]
    if lonely.any():
        i, h, n = lonely.nonzero()[0].tolist()
        raise ValueError(
            f"block_mask: got no critical block for query block {n} (batch {i}, head {h}), and there is no isolated "
            "token to attend to; allowed: at least one block a row. Set its diagonal."
        )
