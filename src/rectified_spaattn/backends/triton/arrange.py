"""Stage 0 of order="content" on a GPU: directions, one projection of every token, one launch a level of the tree."""

import torch
import triton
import triton.language as tl

from ...method.arrange import NODE_SAMPLE, ROUNDS, Moments, moments, sample_of, start_directions
from ...orders import Blocks
from . import columns_of


def content_order(q: torch.Tensor, k: torch.Tensor, blocks: Blocks, scale: float) -> torch.Tensor:
    """int64 [B, Hk, nb * b], as method.arrange.content_order, but for rounding. blocks: on the tensors' device."""
    batch, _, heads, _ = k.shape
    if blocks.num_blocks <= 1:
        return blocks.tiled.expand(batch, heads, -1)
    both = moments(sample_of(q, blocks.tiled, q.shape[2] // heads), sample_of(k, blocks.tiled), scale)
    w = directions(both)  # [B * Hk, 2D, r]
    features = project(q, k, blocks.tiled, w.to(q.dtype), both.mean @ w)
    return blocks.tiled[k_d_order(features, blocks.block_size).long()].view(batch, heads, -1)


def directions(of: Moments) -> torch.Tensor:
    """W [Z, 2D, r], as method.arrange.directions."""
    return principal(of.covariance, of.weigh, as_long_as_deviation=True)


def principal(covariance: torch.Tensor, weigh: torch.Tensor, as_long_as_deviation: bool = False) -> torch.Tensor:
    """W [Z, n, r], as method.residual.principal but by iteration. covariance, weigh: [Z, n, n], n of 64 or more."""
    trees, dim, _ = weigh.shape
    start = start_directions(dim, torch.float32, weigh.device)
    rank = start.shape[1]
    w, seen = torch.empty(2, trees, dim, rank, dtype=torch.float32, device=start.device)
    _directions_kernel[(trees,)](
        covariance.contiguous(), weigh.contiguous(), start, w, seen,
        DIM=dim, COLUMNS=columns_of(dim), RANK=rank, WIDTH=max(16, triton.next_power_of_2(rank)),
        CHUNK=32 if dim < 512 else 16, ROUNDS=ROUNDS,
        STRETCH=as_long_as_deviation, num_warps=8,
    )  # fmt: skip
    return w


def project(
    q: torch.Tensor, k: torch.Tensor, tiled: torch.Tensor, w: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """[q, k] W - shift for the tokens of `tiled`, q the mean query of a key head: bfloat16 [B * Hk, nb * b, r].

    w: [B * Hk, 2D, r], in the inputs' dtype; shift: [B * Hk, 1, r].
    """
    batch, _, heads, dim = k.shape
    rank = w.shape[2]
    features = torch.empty(batch * heads, tiled.numel(), rank, dtype=torch.bfloat16, device=q.device)
    block = 64
    _project_kernel[(triton.cdiv(tiled.numel(), block) * heads, batch)](
        q, k, tiled, w.contiguous(), shift.float().contiguous(), features,
        *q.stride(), *k.stride(), heads, q.shape[2] // heads, tiled.numel(), rank,
        HEAD_DIM=dim, COLUMNS=columns_of(dim), BLOCK=block, WIDTH=max(16, triton.next_power_of_2(rank)), num_warps=4,
    )  # fmt: skip
    return features


def k_d_order(features: torch.Tensor, block_size: int) -> torch.Tensor:
    """int32 [Z, n], as method.arrange.k_d_order. features: bfloat16 [Z, n, r], contiguous, r a power of two."""
    trees, count, rank = features.shape
    blocks = count // block_size
    if blocks <= 1:
        return torch.arange(count, dtype=torch.int32, device=features.device).expand(trees, count)
    size = triton.next_power_of_2(blocks)  # blocks a node
    order, room = (torch.empty(trees, size * block_size, dtype=torch.int32, device=features.device) for _ in "ab")
    first = True
    while size > 1:
        tokens = size * block_size
        chunk = 8192 if tokens > 16384 else min(tokens, 2048)  # the few large nodes keep few programs busy
        _halve_kernel[(triton.cdiv(blocks, size), trees)](
            features, order, room, count, tokens, order.shape[1],
            FIRST=first, RANK=rank, SAMPLE=NODE_SAMPLE, CHUNK=chunk, num_warps=max(2, min(chunk // 256, 16)),
        )  # fmt: skip
        order, room, first, size = room, order, False, size // 2
    return order[:, :count]


@triton.jit
def _times(
    matrix_ptr, x_ptr,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A matrix [DIM, DIM] times x [DIM, RANK], both in memory."""
    i = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    # [COLUMNS, WIDTH]
    product = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for first in tl.range(0, DIM, CHUNK):
        j = first + tl.arange(0, CHUNK)
        # [COLUMNS, CHUNK]: both matrices are symmetric
        columns = tl.trans(tl.load(matrix_ptr + j[:, None] * DIM + i[None, :], mask=i[None, :] < DIM, other=0.0))
        x = tl.load(x_ptr + j[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
        product = tl.dot(columns, x, product, input_precision="ieee")
    return product


@triton.jit
def _keep(x_ptr, x, DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """Writes x [COLUMNS, WIDTH] where all threads of the program can read it."""
    i = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    tl.debug_barrier()
    tl.store(x_ptr + i[:, None] * RANK + r[None, :], x, mask=(i[:, None] < DIM) & (r[None, :] < RANK))
    tl.debug_barrier()


@triton.jit
def _directions_kernel(
    covariance_ptr, weigh_ptr, start_ptr, w_ptr, seen_ptr,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ROUNDS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(0).to(tl.int64)
    covariance_ptr += z * DIM * DIM
    weigh_ptr += z * DIM * DIM
    w_ptr += z * DIM * RANK
    seen_ptr += z * DIM * RANK
    i = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    inside = (i[:, None] < DIM) & (r[None, :] < RANK)
    start = tl.load(start_ptr + i[:, None] * RANK + r[None, :], mask=inside, other=0.0)
    _keep(w_ptr, start, DIM, COLUMNS, RANK, WIDTH)
    _keep(seen_ptr, _times(covariance_ptr, w_ptr, DIM, COLUMNS, RANK, WIDTH, CHUNK), DIM, COLUMNS, RANK, WIDTH)
    for _ in tl.range(0, ROUNDS):
        # [COLUMNS, WIDTH]
        w = tl.zeros((COLUMNS, WIDTH), tl.float32)
        seen = tl.zeros((COLUMNS, WIDTH), tl.float32)
        for _ in tl.static_range(2):
            w = _times(weigh_ptr, seen_ptr, DIM, COLUMNS, RANK, WIDTH, CHUNK)
            _keep(w_ptr, w, DIM, COLUMNS, RANK, WIDTH)
            seen = _times(covariance_ptr, w_ptr, DIM, COLUMNS, RANK, WIDTH, CHUNK)
            _keep(seen_ptr, seen, DIM, COLUMNS, RANK, WIDTH)
        # Gram-Schmidt, such that wᵀ C w = 1; seen is C w throughout
        for column in tl.static_range(RANK):
            # [COLUMNS]
            one = tl.sum(tl.where(r[None, :] == column, w, 0.0), 1)
            one_seen = tl.sum(tl.where(r[None, :] == column, seen, 0.0), 1)
            square = tl.sum(one * one_seen, 0)
            shrink = tl.where(square > 0, tl.rsqrt(tl.maximum(square, 1e-37)), 0.0)
            one *= shrink
            one_seen *= shrink
            # [WIDTH]
            share = tl.sum(one[:, None] * seen, 0)
            w = tl.where(r[None, :] == column, one[:, None], tl.where(r[None, :] > column, w - one[:, None] * share, w))
            seen = tl.where(
                r[None, :] == column, one_seen[:, None],
                tl.where(r[None, :] > column, seen - one_seen[:, None] * share, seen),
            )  # fmt: skip
        _keep(w_ptr, w, DIM, COLUMNS, RANK, WIDTH)
        _keep(seen_ptr, seen, DIM, COLUMNS, RANK, WIDTH)
    if STRETCH:
        w = tl.load(w_ptr + i[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        seen = tl.load(seen_ptr + i[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        spread = tl.sum(seen * _times(weigh_ptr, seen_ptr, DIM, COLUMNS, RANK, WIDTH, CHUNK), 0)
        _keep(w_ptr, w * tl.sqrt(tl.maximum(spread, 0.0))[None, :], DIM, COLUMNS, RANK, WIDTH)


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
