"""Stage 6 with PyTorch alone: gather the kept keys of a few query blocks at a time and call SDPA on them."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan, make_plan
from .call import Call

# Gathered keys and values of one SDPA call: bounded memory, and enough work to be worth the call (measured on a CPU).
_CHUNK_BYTES_CPU = 32 << 20
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

    Returns out [B, S, H, D] and the plan. Raises ValueError where a query block is left without any key ("row" leaves
    none without: a dropped block is a key).
    """
    layout = layout.on(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plans = []
    for i in range(q.shape[0]):  # samples differ in their valid text
        mask = None if block_mask is None else block_mask[i : i + 1]
        plans.append(_run_sample(q[i], k[i], v[i], layout, config, text_valid[i], scale, mask, out[i]))
    each = ([plan[i] for plan in plans] for i in range(5))  # all but the tail, which has been used
    return out, Plan(*(torch.cat(parts) for parts in each))  # type: ignore[arg-type]


def why_not(call: Call) -> str | None:
    return "float64 runs on backend='reference' only" if call.dtype == torch.float64 else None


def _run_sample(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
    block_mask: torch.Tensor | None,
    out: torch.Tensor,
) -> Plan:
    """q, k, v, out: [S, H, D]; text_valid: bool [text]; block_mask: bool [1, H, nb, nb] or None."""
    (_, heads, head_dim), num_blocks, block_size = q.shape, layout.num_blocks, layout.block_size
    valid = torch.cat([text_valid.new_ones(layout.leftover), text_valid])  # [I]
    alone = layout.isolated[valid]
    pooled = num_blocks if config.rectify == "row" else 0
    # blocks of keys: the tiled ones, then the isolated tokens and the pooled keys
    stored = num_blocks + -(-(len(alone) + pooled) // block_size)
    tail = layout.tiled.new_zeros(
        stored * block_size - layout.tiled.numel() - len(alone)
    )  # written below, or never read
    places = torch.cat([layout.tiled, alone, tail])

    q_tiled = _take(q, layout.tiled).view(heads, num_blocks, block_size, head_dim)
    k_all, v_all = (_take(x, places).view(heads, stored, block_size, head_dim) for x in (k, v))
    k_alone = k.index_select(0, layout.isolated).transpose(0, 1)
    tiled = (q_tiled[None], k_all[None, :, :num_blocks], v_all[None, :, :num_blocks])
    plan = make_plan(*tiled, k_alone[None], valid[None], layout, config, scale, block_mask)
    if plan.tail is None:
        _require_keys(plan.block_mask, len(alone))
    else:
        first = num_blocks * block_size + len(alone)
        for x, means in ((k_all, plan.tail.k), (v_all, plan.tail.v)):
            x.view(heads, -1, head_dim)[:, first : first + num_blocks] = means[0]
    _attend(q_tiled, k_all, v_all, plan, len(alone), scale, out, layout)
    if layout.isolated.numel():
        q_alone = q.index_select(0, layout.isolated).transpose(0, 1)[None]  # [1, H, I, D]
        length = num_blocks * block_size + len(alone)
        k_row, v_row = (x.flatten(1, 2)[None, :, :length] for x in (k_all, v_all))
        dense = scaled_dot_product_attention(q_alone, k_row, v_row, scale=scale)
        out.index_copy_(0, layout.isolated, dense[0].transpose(0, 1))
    return plan


def _rows(places: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of an [S * H, D] view that hold the tokens at `places`, head after head: int64 [H * places]."""
    return (places * heads + torch.arange(heads, device=places.device)[:, None]).flatten()


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    # [S, H, D] -> [H * places, D] in one pass
    heads = x.shape[1]
    return x.reshape(-1, x.shape[2]).index_select(0, _rows(places, heads))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    isolated: int,
    scale: float,
    out: torch.Tensor,
    layout: TokenLayout,
) -> None:
    """Writes R * softmax(...) V + C of every query block to its tokens' places in out.

    Query blocks with equally many critical blocks share SDPA calls, so nothing is padded or masked. q: [H, nb, b, D];
    k, v: [H, nb + e, b, D] with `isolated` tokens in the last e blocks, and behind them, where the plan has a tail, its
    nb pooled keys: these carry their bias, and R and C do not count. plan of one sample; out: [S, H, D].
    """
    heads, num_blocks, block_size, head_dim = q.shape
    stored = k.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    r, c = plan.r[0].flatten()[:, None, None], plan.c[0].flatten(0, 1)[:, None, :]
    attended, done = torch.empty_like(q), 0  # in the order in which query blocks are attended

    rows, columns = plan.block_mask[0].flatten(0, 1).nonzero(as_tuple=True)
    blocks = rows // max(1, num_blocks) * stored + columns  # index into k and v, sorted by row
    counts = torch.bincount(rows, minlength=heads * num_blocks)
    starts = counts.cumsum(0) - counts
    tail = torch.arange(num_blocks, stored, device=q.device)
    # a softmax ignores what all logits share: without log b, half precision holds what is left of the biases
    level = torch.tensor(math.log(block_size)).to(q.dtype).item()
    budget = _CHUNK_BYTES_CPU if q.device.type == "cpu" else _CHUNK_BYTES
    order = counts.argsort(stable=True)
    for count, rows_of_count in zip(*(x.tolist() for x in counts.unique(return_counts=True)), strict=True):
        same = order[done : done + rows_of_count]
        critical = blocks[starts[same, None] + torch.arange(count, device=q.device)]
        index = torch.cat([critical, same[:, None] // num_blocks * stored + tail], dim=1)
        exact = count * block_size + isolated
        length = exact if plan.tail is None else exact + num_blocks
        at_once = max(1, budget // (2 * k.element_size() * head_dim * max(1, length)))
        buffers = k.new_empty(2, min(at_once, len(same)) * index.shape[1], block_size, head_dim)
        for row, kept in zip(same.split(at_once), index.split(at_once), strict=True):
            k_kept, v_kept = (
                _gather(x, kept, buffer)[:, :, :length] for x, buffer in zip((k, v), buffers, strict=True)
            )
            here = attended[done : done + len(row)]
            if plan.tail is None:
                sparse = scaled_dot_product_attention(q[row, None], k_kept, v_kept, scale=scale)[:, 0]
                torch.addcmul(c[row], sparse, r[row], out=here)
            else:
                bias = q.new_full((len(row), 1, 1, length), -level)
                bias[..., exact:] = plan.tail.bias[0].flatten(0, 1)[row, None, None] - level
                here.copy_(
                    scaled_dot_product_attention(q[row, None], k_kept, v_kept, attn_mask=bias, scale=scale)[:, 0]
                )
            done += len(row)
    places = _rows(layout.tiled, heads).view(-1, block_size)[order]
    out.view(-1, head_dim).index_copy_(0, places.flatten(), attended.view(-1, head_dim))


def _gather(x: torch.Tensor, index: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    # [blocks, b, D] at [rows, n] -> [rows, 1, n * b, D]
    torch.index_select(x, 0, index.flatten(), out=buffer[: index.numel()])
    return buffer[: index.numel()].view(len(index), 1, index.shape[1] * x.shape[1], x.shape[2])


def _require_keys(block_mask: torch.Tensor, isolated: int) -> None:
    lonely = ~block_mask.any(-1)
    if isolated == 0 and lonely.any():
        _, h, n = lonely.nonzero()[0].tolist()
        raise ValueError(
            f"block_mask: got no critical block for query block {n} of head {h}, and there is no isolated token to "
            "attend to; allowed: at least one block a row. Set its diagonal."
        )
