"""Stage 0 of order="content" on a GPU: every token projected on its axes, then the tree, one launch a level, and one
for all levels below nodes that one program holds.
"""

import torch
import triton
import triton.language as tl

from ...method.arrange import NODE_SAMPLE
from ...orders import Blocks
from . import columns_of
from .directions import Axes, moments, of_sorting

_AT_ONCE = 4096  # tokens of a node that one program cuts down to blocks
_HELD = 16384  # tokens of a node that one program holds


def content_order(q: torch.Tensor, k: torch.Tensor, blocks: Blocks, scale: float) -> torch.Tensor:
    """int32 [B, Hk, nb * b], as method.arrange.content_order, but for rounding. blocks: on the tensors' device."""
    batch, _, heads, _ = k.shape
    if blocks.num_blocks <= 1:
        return blocks.tiled.int().expand(batch, heads, -1)
    axes = of_sorting(moments(q, k, blocks.tiled, scale), q.dtype)
    features = project(q, k, blocks.tiled, axes)
    return k_d_order(features, blocks.tiled, blocks.block_size).view(batch, heads, -1)


def project(q: torch.Tensor, k: torch.Tensor, tiled: torch.Tensor, axes: Axes) -> torch.Tensor:
    """[q, k] W - shift for the tokens of `tiled`, q the mean query of a key head: bfloat16 [B * Hk, nb * b, r].

    axes: in the inputs' dtype.
    """
    batch, _, heads, dim = k.shape
    rank = axes.w.shape[2]
    features = torch.empty(batch * heads, tiled.numel(), rank, dtype=torch.bfloat16, device=q.device)
    block = 64
    _project_kernel[(triton.cdiv(tiled.numel(), block) * heads, batch)](
        q, k, tiled, *axes, features,
        *q.stride(), *k.stride(), heads, q.shape[2] // heads, tiled.numel(), rank,
        HEAD_DIM=dim, COLUMNS=columns_of(dim), BLOCK=block, WIDTH=max(16, triton.next_power_of_2(rank)), num_warps=4,
    )  # fmt: skip
    return features


def k_d_order(features: torch.Tensor, tiled: torch.Tensor, block_size: int) -> torch.Tensor:
    """int32 [Z, n]: the places in `tiled` in the order of method.arrange.k_d_order.

    features: bfloat16 [Z, n, r], contiguous, r a power of two; tiled: int64 [n].
    """
    trees, count, rank = features.shape
    blocks = count // block_size
    if blocks <= 1:
        return tiled.int().expand(trees, count)
    size = triton.next_power_of_2(blocks)  # blocks a node
    small = min(size, _AT_ONCE // block_size)
    order, room = features.new_empty(2, trees, size * block_size, dtype=torch.int32)
    places = features.new_empty(trees, count, dtype=torch.int32)
    first, width = True, size * block_size
    while size > 1:
        tokens, nodes = size * block_size, triton.cdiv(blocks, size)
        constants = {"FIRST": first, "RANK": rank, "SAMPLE": NODE_SAMPLE}
        if tokens > _HELD:  # the few large nodes keep few programs busy
            _halve_kernel[(nodes, trees)](
                features, order, room, count, tokens, width, CHUNK=8192, num_warps=16, **constants
            )
            size //= 2
        else:
            levels = 1 if size > small else small.bit_length() - 1
            _cut_kernel[(nodes, trees)](
                features, order, room, tiled, places, count, width,
                LEVELS=levels, TOKENS=tokens, LAST=size == small, num_warps=max(1, tokens // 512), **constants,
            )  # fmt: skip
            size >>= levels
        order, room, first = room, order, False
    return places


@triton.jit
def _project_kernel(
    q_ptr, k_ptr, places_ptr, w_ptr, shift_ptr, out_ptr,
    q_sb, q_ss, q_sh, q_sd,
    k_sb, k_ss, k_sh, k_sd,
    heads, group, count, rank,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    chunk, h, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    z, h = batch * heads + h, h.to(tl.int64)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    # [BLOCK]
    place = tl.load(places_ptr + i, mask=i < count, other=0)
    # [BLOCK, COLUMNS]
    from_q = q_ptr + batch * q_sb + h * group * q_sh + place[:, None] * q_ss + d[None, :].to(tl.int64) * q_sd
    from_k = k_ptr + batch * k_sb + h * k_sh + place[:, None] * k_ss + d[None, :].to(tl.int64) * k_sd
    there = d[None, :] < HEAD_DIM
    # [COLUMNS, WIDTH]
    at_w = w_ptr + (z * 2 * HEAD_DIM + d[:, None]) * rank + r[None, :]
    in_w = (d[:, None] < HEAD_DIM) & (r[None, :] < rank)
    w_q = tl.load(at_w, mask=in_w, other=0.0)
    w_k = tl.load(at_w + HEAD_DIM * rank, mask=in_w, other=0.0)
    # [BLOCK, WIDTH]
    feature = tl.zeros((BLOCK, WIDTH), tl.float32)
    for each in tl.range(0, group):
        feature = tl.dot(tl.load(from_q + each * q_sh, mask=there, other=0.0), w_q, feature, input_precision="ieee")
    feature = feature / group
    feature = tl.dot(tl.load(from_k, mask=there, other=0.0), w_k, feature, input_precision="ieee")
    feature -= tl.load(shift_ptr + z * rank + r, mask=r < rank, other=0.0)[None, :]
    feature = tl.where(feature == feature, feature, 0.0)
    to = out_ptr + (z * count + i[:, None]) * rank + r[None, :]
    tl.store(to, feature.to(tl.bfloat16), mask=(i[:, None] < count) & (r[None, :] < rank))


@triton.jit
def _token(order_ptr, at, first, count, FIRST: tl.constexpr):
    """Which token stands at a place of the node; `count` where none does."""
    return tl.minimum(at, count) if FIRST else tl.load(order_ptr + first + at)


@triton.jit
def _key(feature_ptr, token, axis, count, RANK: tl.constexpr):
    """A bfloat16 feature as an integer of 16 bits in the same order; absent tokens come last."""
    bits = tl.load(feature_ptr + token.to(tl.int64) * RANK + axis, mask=token < count, other=0.0)
    bits = bits.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    bits = tl.where(bits == 0x8000, 0, bits)  # -0 is 0
    return tl.where(token < count, tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000), 0xFFFF)


@triton.jit
def _halve_kernel(
    features_ptr, from_ptr, to_ptr, count, tokens, width,
    FIRST: tl.constexpr, RANK: tl.constexpr, SAMPLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Cuts one node of one tree: the smaller half of its tokens first, each half in the order it had."""
    z = tl.program_id(1).to(tl.int64)
    feature_ptr = features_ptr + z * count * RANK
    first = z * width + tl.program_id(0) * tokens
    half = tokens // 2

    # [SAMPLE, RANK]
    some = _token(from_ptr, tl.arange(0, SAMPLE) * (tokens // SAMPLE), first, count, FIRST)
    there = (some < count)[:, None]
    axes = tl.arange(0, RANK)
    point = tl.load(feature_ptr + some.to(tl.int64)[:, None] * RANK + axes[None, :], mask=there, other=0.0).to(
        tl.float32
    )
    mean = tl.sum(point, 0) / tl.maximum(tl.sum(there.to(tl.float32), 0), 1.0)
    apart = tl.where(there, point - mean[None, :], 0.0)
    axis = tl.argmax(tl.sum(apart * apart, 0), 0)

    # the half-th smallest key: first its high byte, then its low one
    # [256]
    byte = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for start in tl.range(0, tokens, CHUNK):
        # [CHUNK]
        token = _token(from_ptr, start + tl.arange(0, CHUNK), first, count, FIRST)
        counts += tl.histogram(_key(feature_ptr, token, axis, count, RANK) >> 8, 256)
    high = tl.sum((tl.cumsum(counts, 0) < half).to(tl.int32), 0)
    below = tl.sum(tl.where(byte < high, counts, 0), 0)
    # [512]: the upper half counts all other keys
    both = tl.arange(0, 512)
    counts = tl.zeros((512,), tl.int32)
    for start in tl.range(0, tokens, CHUNK):
        token = _token(from_ptr, start + tl.arange(0, CHUNK), first, count, FIRST)
        key = _key(feature_ptr, token, axis, count, RANK)
        counts += tl.histogram(tl.where(key >> 8 == high, key & 255, 256), 512)
    counts = tl.where(both < 256, counts, 0)
    low = tl.sum(((tl.cumsum(counts, 0) < half - below) & (both < 256)).to(tl.int32), 0)
    below += tl.sum(tl.where(both < low, counts, 0), 0)
    edge = high * 256 + low

    # of equal keys the first ones go left
    wanted = half - below
    equal_before = 0
    left_before = 0
    for start in tl.range(0, tokens, CHUNK):
        at = start + tl.arange(0, CHUNK)
        token = _token(from_ptr, at, first, count, FIRST)
        key = _key(feature_ptr, token, axis, count, RANK)
        equal = (key == edge).to(tl.int32)
        left = (key < edge) | ((equal != 0) & (equal_before + tl.cumsum(equal, 0) <= wanted))
        rank = left_before + tl.cumsum(left.to(tl.int32), 0)
        tl.store(to_ptr + first + tl.where(left, rank - 1, half + at - rank), token)
        equal_before += tl.sum(equal, 0)
        left_before += tl.sum(left.to(tl.int32), 0)


@triton.jit
def _halves(
    feature_ptr, token, some, count,
    NODES: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Where the tokens of some nodes, [NODES, SIZE], go, as _halve_kernel puts them. some: [NODES, sample] of them."""
    half: tl.constexpr = SIZE // 2
    # [NODES, sample, RANK]
    there = (some < count)[:, :, None]
    at = some.to(tl.int64)[:, :, None] * RANK + tl.arange(0, RANK)[None, None, :]
    point = tl.load(feature_ptr + at, mask=there, other=0.0).to(tl.float32)
    # [NODES, RANK]
    mean = tl.sum(point, 1) / tl.maximum(tl.sum(there.to(tl.float32), 1), 1.0)
    apart = tl.where(there, point - mean[:, None, :], 0.0)
    axis = tl.argmax(tl.sum(apart * apart, 1), 1)
    # [NODES, SIZE]
    key = _key(feature_ptr, token, axis[:, None], count, RANK)
    # the half-th smallest key, from its highest bits down: two a turn, as the three sums do not wait for each other
    edge = tl.zeros((NODES,), tl.int32)
    for turn in tl.range(0, 8):
        step = 1 << (14 - 2 * turn)
        found = tl.zeros((NODES,), tl.int32)
        for more in tl.static_range(1, 4):
            smaller = tl.sum((key < (edge + more * step)[:, None]).to(tl.int32), 1)
            found += (smaller < half).to(tl.int32)
        edge += found * step
    # of equal keys the first ones go left
    below = (key < edge[:, None]).to(tl.int32)
    equal = (key == edge[:, None]).to(tl.int32)
    wanted = half - tl.sum(below, 1)
    left = (below != 0) | ((equal != 0) & (tl.cumsum(equal, 1) <= wanted[:, None]))
    rank = tl.cumsum(left.to(tl.int32), 1)
    t = tl.arange(0, SIZE)[None, :]
    return tl.arange(0, NODES)[:, None] * SIZE + tl.where(left, rank - 1, half + t - rank)


@triton.jit
def _cut_kernel(
    features_ptr, from_ptr, room_ptr, tiled_ptr, places_ptr, count, width,
    FIRST: tl.constexpr, LAST: tl.constexpr, LEVELS: tl.constexpr, TOKENS: tl.constexpr,
    RANK: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Cuts one node of one tree, and its halves, LEVELS times in all. LAST: writes which places stand where."""
    z = tl.program_id(1).to(tl.int64)
    feature_ptr = features_ptr + z * count * RANK
    first = z * width + tl.program_id(0) * TOKENS
    places_ptr += z * count + tl.program_id(0) * TOKENS
    for level in tl.static_range(LEVELS):
        # [nodes, tokens of a node], [nodes, SAMPLE]
        node = tl.arange(0, 1 << level)[:, None] * (TOKENS >> level)
        at = node + tl.arange(0, TOKENS >> level)[None, :]
        some_at = node + tl.arange(0, SAMPLE)[None, :] * ((TOKENS >> level) // SAMPLE)
        if level == 0:
            token = _token(from_ptr, at, first, count, FIRST)
            some = _token(from_ptr, some_at, first, count, FIRST)
        else:
            tl.debug_barrier()
            token = tl.load(room_ptr + first + at)
            some = tl.load(room_ptr + first + some_at)
        to = _halves(feature_ptr, token, some, count, 1 << level, TOKENS >> level, RANK)
        if LAST and level + 1 == LEVELS:
            place = tl.load(tiled_ptr + token, mask=token < count, other=0).to(tl.int32)
            tl.store(places_ptr + to, place, mask=token < count)
        else:
            tl.debug_barrier()
            tl.store(room_ptr + first + to, token)
