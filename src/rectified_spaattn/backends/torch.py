"""Stage 6 with PyTorch alone: gather the kept keys of a few query blocks at a time and call SDPA on them."""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..method.apart import attend_apart
from ..method.arrange import content_order
from ..method.inputs import Inputs
from ..method.plan import Choices, decide
from ..method.rectify import Rectification
from ..method.tail import CAP, Tail
from .calls import Backend, Call, why_not_8_bits

# Gathered keys and values of one SDPA call: bounded memory, and enough work to be worth the call (measured on a CPU).
_CHUNK_BYTES_CPU = 32 << 20
_CHUNK_BYTES = 512 << 20


class Sample(NamedTuple):
    """One sample of a batch, block after block.

    q         [H, nb, b, D]
    k, v      [Hk, nb + e, b, D]: the tiled blocks, then `isolated` valid tokens, then, where there is a tail, its nb
              pooled keys. Where there is a slope, q, k and v are some columns wider: v has a 1 in the first of them for
              pooled keys, all else is 0
    isolated  how many
    places    int64 [nb*b] or [Hk, nb*b], where in the sequence the tiled tokens stand
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    isolated: int
    places: torch.Tensor
    choices: Choices
    rectification: Rectification


def why_not(call: Call) -> str | None:
    if call.dtype == torch.float64:
        return "float64 runs on backend='reference' only"
    return why_not_8_bits(call)


def sort(inputs: Inputs) -> torch.Tensor:
    """int64 [B, Hk, nb*b]: the tiled tokens of every key head by content."""
    blocks = inputs.blocks
    return content_order(inputs.q, inputs.k, blocks.tiled, block_size=blocks.block_size, scale=inputs.scale)


def plan(inputs: Inputs) -> tuple[Choices, list[Sample]]:
    """Stages 1 to 5. Raises ValueError where a query block is left without any key."""
    samples = [_plan_sample(inputs, i) for i in range(inputs.q.shape[0])]  # they differ in their valid text
    return Choices(*(torch.cat(parts) for parts in zip(*(each.choices for each in samples), strict=True))), samples


def attend(inputs: Inputs, samples: list[Sample]) -> torch.Tensor:
    """out [B, S, H, D]."""
    out = inputs.new_out()
    isolated = inputs.blocks.isolated[inputs.blocks.attending]
    for i, sample in enumerate(samples):
        _attend(sample, inputs.scale, out[i])
        if isolated.numel():
            q = inputs.q[i].index_select(0, isolated).transpose(0, 1)  # [H, I, D]
            length = sample.q.shape[1] * sample.q.shape[2] + sample.isolated
            k, v = (x.flatten(1, 2)[None, :, :length, : q.shape[2]] for x in (sample.k, sample.v))
            of_keys = q.reshape(1, k.shape[1], -1, q.shape[2])  # the queries that share a key head, one after the other
            dense = scaled_dot_product_attention(of_keys, k, v, scale=inputs.scale)
            out[i].index_copy_(0, isolated, dense.view(q.shape).transpose(0, 1))
    attend_apart(inputs, out)
    return out


def _plan_sample(inputs: Inputs, i: int) -> Sample:
    blocks, rule = inputs.blocks, inputs.config.rule
    q, k, v = inputs.q[i], inputs.k[i], inputs.v[i]
    (_, heads, head_dim), num_blocks, b = k.shape, blocks.num_blocks, blocks.block_size
    one = slice(i, i + 1)
    inputs = inputs._replace(
        q=inputs.q[one],
        k=inputs.k[one],
        v=inputs.v[one],
        text_mask=inputs.text_mask[one],
        block_mask=None if inputs.block_mask is None else inputs.block_mask[one],
        top_k=None if inputs.top_k is None else inputs.top_k[one],
    )
    alone = blocks.isolated[inputs.valid[0]]
    tiled = blocks.tiled if inputs.token_order is None else inputs.token_order[i].long()
    pooled = num_blocks if rule.tail else 0
    # blocks of keys: the tiled ones, then the isolated tokens and the pooled keys
    stored = num_blocks + -(-(len(alone) + pooled) // b)
    unwritten = alone.new_zeros(stored * b - num_blocks * b - len(alone))  # written below, or never read
    rest = torch.cat([alone, unwritten])
    places = torch.cat([tiled, rest.expand(*tiled.shape[:-1], -1)], dim=-1)

    q_tiled = _take(q, tiled).view(q.shape[1], num_blocks, b, head_dim)
    k_all, v_all = (_take(x, places).view(heads, stored, b, head_dim) for x in (k, v))
    k_isolated = k.index_select(0, blocks.isolated).transpose(0, 1)
    choices, rectification = decide(
        inputs, q_tiled[None], k_all[None, :, :num_blocks], v_all[None, :, :num_blocks], k_isolated[None]
    )
    if not len(alone):
        _require_keys(choices.block_mask | choices.compensated if rule.tail else choices.block_mask)
    if rectification.tail is not None:
        first = num_blocks * b + len(alone)
        for x, means in ((k_all, rectification.tail.k), (v_all, rectification.tail.v)):
            x.view(heads, -1, head_dim)[:, first : first + num_blocks] = means[0]
        if rectification.slope is not None:  # the attention to a column of ones is the share of the keys that have one
            wider = (0, 8 - head_dim % 8)
            q_tiled, k_all, v_all = (torch.nn.functional.pad(x, wider) for x in (q_tiled, k_all, v_all))
            v_all.flatten(1, 2)[:, first : first + num_blocks, head_dim] = 1
    return Sample(q_tiled, k_all, v_all, len(alone), tiled, choices, rectification)


def _rows(places: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of an [S * H, D] view that hold the tokens at `places`, head after head: int64 [H * n].

    places: [n] or, for heads in as many groups, [groups, n].
    """
    if places.ndim == 2:
        places = places.repeat_interleave(heads // len(places), dim=0)
    return (places * heads + torch.arange(heads, device=places.device)[:, None]).flatten()


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    # [S, H, D] -> [H * n, D] in one pass
    return x.reshape(-1, x.shape[2]).index_select(0, _rows(places, x.shape[1]))


def _attend(sample: Sample, scale: float, out: torch.Tensor) -> None:
    """Writes R * softmax(...) V + C of every query block to its tokens' places in out [S, H, D].

    Query blocks with equally many critical blocks share SDPA calls, so nothing is padded or masked. Pooled keys carry
    their bias; where there are some, R and C do not count.
    """
    heads, num_blocks, block_size, width = sample.q.shape
    head_dim, stored, a_group = out.shape[2], sample.k.shape[1], num_blocks * (heads // len(sample.k))
    q, k, v = (x.flatten(0, 1) for x in (sample.q, sample.k, sample.v))
    rectification = sample.rectification
    r = rectification.r[0].flatten()[:, None, None]
    attended, finished = q.new_empty(len(q), block_size, head_dim), 0  # in the order in which query blocks are attended

    rows, columns = sample.choices.block_mask[0].flatten(0, 1).nonzero(as_tuple=True)
    key_blocks = rows // max(1, a_group) * stored + columns  # index into k and v, sorted by row
    counts = torch.bincount(rows, minlength=heads * num_blocks)
    starts = counts.cumsum(0) - counts
    rest = torch.arange(num_blocks, stored, device=q.device)
    # a softmax ignores what all logits share: without log b, half precision holds what is left of the biases
    level = torch.tensor(math.log(block_size)).to(q.dtype).item()
    budget = _CHUNK_BYTES_CPU if q.device.type == "cpu" else _CHUNK_BYTES
    order = counts.argsort(stable=True)
    for count, rows_of_count in zip(*(x.tolist() for x in counts.unique(return_counts=True)), strict=True):
        same = order[finished : finished + rows_of_count]
        critical = key_blocks[starts[same, None] + torch.arange(count, device=q.device)]
        index = torch.cat([critical, same[:, None] // a_group * stored + rest], dim=1)
        exact = count * block_size + sample.isolated
        length = exact if rectification.tail is None else exact + num_blocks
        at_once = max(1, budget // (2 * k.element_size() * width * max(1, length)))
        buffers = k.new_empty(2, min(at_once, len(same)) * index.shape[1], block_size, width)
        for row, kept in zip(same.split(at_once), index.split(at_once), strict=True):
            k_kept, v_kept = (
                _gather(x, kept, buffer)[:, :, :length] for x, buffer in zip((k, v), buffers, strict=True)
            )
            here = attended[finished : finished + len(row)]
            if rectification.tail is None:
                c = rectification.c[0].flatten(0, 1)[:, None, :]
                sparse = scaled_dot_product_attention(q[row, None], k_kept, v_kept, scale=scale)[:, 0]
                torch.addcmul(c[row], sparse, r[row], out=here)
            else:
                queries = 1 if rectification.tail.k_var is None else block_size
                bias = q.new_full((len(row), 1, queries, length), -level)
                bias[..., exact:] = _pooled_bias(rectification.tail, sample.q, row, head_dim, scale) - level
                both = scaled_dot_product_attention(q[row, None], k_kept, v_kept, attn_mask=bias, scale=scale)[:, 0]
                if rectification.slope is None:
                    here.copy_(both)
                else:
                    slope = rectification.slope[0, row // num_blocks]  # [rows, D, D]
                    asked = q[row, :, :head_dim].to(slope.dtype) * both[..., head_dim, None]
                    here.copy_(torch.baddbmm(both[..., :head_dim].to(slope.dtype), asked, slope))
            finished += len(row)
    places = _rows(sample.places, heads).view(-1, block_size)[order]
    out.view(-1, head_dim).index_copy_(0, places.flatten(), attended.view(-1, head_dim))


def _pooled_bias(tail: Tail, q: torch.Tensor, row: torch.Tensor, head_dim: int, scale: float) -> torch.Tensor:
    """[rows, 1, 1 or b, nb], of some query blocks of one sample. q: [H, nb, b, D or wider]; row: int64 [rows]."""
    heads, num_blocks = q.shape[:2]
    bias = tail.bias[0].flatten(0, 1)[row, None]  # [rows, 1, nb]
    if tail.k_var is None:
        return bias[:, None]
    k_var = tail.k_var[0, row // num_blocks // (heads // tail.k_var.shape[1])]  # [rows, nb, D]
    square = (scale * q.flatten(0, 1)[row, :, :head_dim].to(k_var.dtype)).square_()
    return (bias + (0.5 * square @ k_var.transpose(1, 2)).clamp_(max=CAP))[:, None]


def _gather(x: torch.Tensor, index: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    # [blocks, b, D] at [rows, n] -> [rows, 1, n * b, D]
    torch.index_select(x, 0, index.flatten(), out=buffer[: index.numel()])
    return buffer[: index.numel()].view(len(index), 1, index.shape[1] * x.shape[1], x.shape[2])


def _require_keys(keys: torch.Tensor) -> None:
    """keys: bool [1, H, nb, nb], the blocks that a query block sees."""
    lonely = ~keys.any(-1)
    if lonely.any():
        _, h, n = lonely.nonzero()[0].tolist()
        raise ValueError(
            f"block_mask: got no critical block for query block {n} of head {h}, and there is no isolated token to "
            "attend to; allowed: at least one block a row. Set its diagonal."
        )


BACKEND = Backend(why_not=why_not, sorting="torch", sort=sort, plan=plan, attend=attend)
