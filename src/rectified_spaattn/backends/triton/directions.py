"""The directions in which logits differ most, on a GPU: one launch for a sample's moments, one for the iteration."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...method.arrange import DIRECTIONS, ROUNDS, SAMPLE
from ...method.residual import Directions
from . import ROOMY, arch_of, columns_of
from .halves import dot_halves, halves, store_halves


class Moments(NamedTuple):
    """Of [q, k] over some tokens, q the mean query of a token.

    mean        float32 [Z, 2D]
    covariance  [2, Z, 2D, 2D], the float32 value as the sum of two
    weigh       [2, Z, 2, D, D], likewise, the second moments of k (centred) and of all queries, times scale²
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    weigh: torch.Tensor


class Axes(NamedTuple):
    """w [Z, 2D, r] as method.arrange.directions, in the dtype asked for; shift [Z, r], what the mean is there."""

    w: torch.Tensor
    shift: torch.Tensor


def moments(q: torch.Tensor, k: torch.Tensor, tiled: torch.Tensor, scale: float) -> Moments:
    """Of the tokens that method.arrange.sample_of takes. q: [B, S, H, D]; k: [B, S, Hk, D]; tiled: int64 [nb * b]."""
    batch, _, heads, dim = k.shape
    trees, group = batch * heads, q.shape[2] // heads
    step, half = -(-tiled.numel() // SAMPLE), torch.bfloat16 if q.is_cuda else torch.float32
    of = Moments(
        k.new_empty(trees, 2 * dim, dtype=torch.float32),
        k.new_empty(2, trees, 2 * dim, 2 * dim, dtype=half),
        k.new_empty(2, trees, 2, dim, dim, dtype=half),
    )
    tile = 32
    parts = 2 * dim // tile
    _moments_kernel[(parts * parts, trees)](
        q, k, tiled, *of, *q.stride(), *k.stride(),
        heads, -(-tiled.numel() // step), step, of.covariance[0].numel(), scale * scale,
        HEAD_DIM=dim, TILE=tile, CHUNK=64, GROUP=group, num_warps=4,
    )  # fmt: skip
    return of


def of_sorting(of: Moments, dtype: torch.dtype) -> Axes:
    """In which tokens are told apart."""
    trees, dim = of.mean.shape
    rank = min(DIRECTIONS, dim)
    axes = Axes(of.mean.new_empty(trees, dim, rank, dtype=dtype), of.mean.new_empty(trees, rank))
    _iterate(of, 1.0, axes.w, axes.shift, both=True)
    return axes


def of_errors(of: Moments, heads: int, scale: float, dtype: torch.dtype) -> Directions:
    """As method.residual.directions, in dtype. heads: of keys."""
    trees, both = of.mean.shape
    dim = both // 2
    found = Directions(
        *(of.mean.new_empty(trees // heads, heads, dim, min(DIRECTIONS, dim), dtype=dtype) for _ in "qk")
    )
    _iterate(of, scale, *found, both=False)
    return found


def _iterate(of: Moments, scale: float, first: torch.Tensor, second: torch.Tensor, both: bool) -> None:
    trees, dim = of.mean.shape
    dim = dim if both else dim // 2
    rank = min(DIRECTIONS, dim)
    tiling = tiling_of(arch_of(of.mean.device), dim)
    held = not tiling.chunk
    room = of.mean.new_empty((0,) if held else (trees, dim, rank))
    _directions_kernel[(trees,)](
        of.mean, of.covariance, of.weigh, room, first, second, of.covariance[0].numel(), scale,
        DIM=dim, HEAD_DIM=of.weigh.shape[-1], COLUMNS=rows_of(dim), RANK=rank,
        WIDTH=max(16, triton.next_power_of_2(rank)), CHUNK=tiling.chunk, ROUNDS=ROUNDS, BOTH=both,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


class Tiling(NamedTuple):
    """Columns of a matrix at once, 0: all, as all matrices fit into shared memory; warps; pipeline stages."""

    chunk: int
    num_warps: int
    num_stages: int


def tiling_of(arch: str, dim: int) -> Tiling:
    """arch: "hip", or the compute capability as in "90"."""
    warps = 16 if arch in ("100", "103") else 8  # with eight Triton 3.6 does not compile it for Blackwell
    if arch not in ROOMY:
        return Tiling(32 if dim <= 256 else 16, warps, 1)
    return Tiling(0, warps, 1) if dim <= 128 else Tiling(32, warps, 2 if dim <= 256 else 1)


def rows_of(dim: int) -> int:
    """Of a tile: eight warps on 64 make an illegal access on Hopper (Triton 3.6)."""
    return max(128, columns_of(dim))


@triton.jit
def _columns(
    q_ptr, k_ptr, place, there, q_ss, q_sh, q_sd, k_ss, k_sd, part, of_group,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Some columns of some tokens of q or of k, [tokens, TILE], zeros where there are none. of_group: which query head
    of those that share a key head; None: their mean.
    """
    parts: tl.constexpr = (HEAD_DIM + TILE - 1) // TILE
    d = part % parts * TILE + tl.arange(0, TILE)
    mask = there[:, None] & (d[None, :] < HEAD_DIM)
    if part >= parts:
        at = k_ptr + place[:, None] * k_ss + d[None, :].to(tl.int64) * k_sd
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        at = q_ptr + place[:, None] * q_ss + d[None, :].to(tl.int64) * q_sd
        if of_group is not None:
            x = tl.load(at + of_group * q_sh, mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            for other in tl.range(1, GROUP):
                x += tl.load(at + other * q_sh, mask=mask, other=0.0).to(tl.float32)
            x /= GROUP
    return x


@triton.jit
def _product(x, y, acc, DTYPE: tl.constexpr):
    """acc + xᵀ y"""
    x_high, x_low = halves(x, DTYPE)
    y_high, y_low = halves(y, DTYPE)
    return dot_halves(tl.trans(x_high), tl.trans(x_low), y_high, y_low, acc)


@triton.jit
def _moments_kernel(
    q_ptr, k_ptr, places_ptr, mean_ptr, covariance_ptr, weigh_ptr,
    q_sb, q_ss, q_sh, q_sd,
    k_sb, k_ss, k_sh, k_sd,
    heads, count, step, half, scale_2,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the moments of one key head; its mirror image, too."""
    parts: tl.constexpr = (HEAD_DIM + TILE - 1) // TILE
    row, column = tl.program_id(0) // (2 * parts), tl.program_id(0) % (2 * parts)
    if column < row:
        return
    z = tl.program_id(1).to(tl.int64)
    q_ptr += z // heads * q_sb + z % heads * GROUP * q_sh
    k_ptr += z // heads * k_sb + z % heads * k_sh
    i = tl.arange(0, CHUNK)
    # sums of what is less a number near the mean lose nothing
    # [CHUNK]
    place = tl.load(places_ptr + (i * count // CHUNK).to(tl.int64) * step)
    every = i >= 0
    # [TILE]
    near_x = tl.sum(_columns(q_ptr, k_ptr, place, every, q_ss, q_sh, q_sd, k_ss, k_sd, row, None,
                             HEAD_DIM, TILE, GROUP), 0) / CHUNK  # fmt: skip
    near_y = tl.sum(_columns(q_ptr, k_ptr, place, every, q_ss, q_sh, q_sd, k_ss, k_sd, column, None,
                             HEAD_DIM, TILE, GROUP), 0) / CHUNK  # fmt: skip
    sum_x = tl.zeros((TILE,), tl.float32)
    sum_y = tl.zeros((TILE,), tl.float32)
    # [TILE, TILE]
    total = tl.zeros((TILE, TILE), tl.float32)
    each = tl.zeros((TILE, TILE), tl.float32)  # of single queries
    for start in tl.range(0, count, CHUNK):
        there = start + i < count
        place = tl.load(places_ptr + (start + i).to(tl.int64) * step, mask=there, other=0)
        # [CHUNK, TILE]
        x = _columns(q_ptr, k_ptr, place, there, q_ss, q_sh, q_sd, k_ss, k_sd, row, None, HEAD_DIM, TILE, GROUP)
        y = _columns(q_ptr, k_ptr, place, there, q_ss, q_sh, q_sd, k_ss, k_sd, column, None, HEAD_DIM, TILE, GROUP)
        x = tl.where(there[:, None], x - near_x[None, :], 0.0)
        y = tl.where(there[:, None], y - near_y[None, :], 0.0)
        sum_x += tl.sum(x, 0)
        sum_y += tl.sum(y, 0)
        total = _product(x, y, total, covariance_ptr.dtype.element_ty)
        if GROUP > 1:
            for g in tl.range(0, tl.where(column < parts, GROUP, 0)):
                x = _columns(q_ptr, k_ptr, place, there, q_ss, q_sh, q_sd, k_ss, k_sd, row, g, HEAD_DIM, TILE, GROUP)
                y = _columns(q_ptr, k_ptr, place, there, q_ss, q_sh, q_sd, k_ss, k_sd, column, g, HEAD_DIM, TILE, GROUP)
                x = tl.where(there[:, None], x - near_x[None, :], 0.0)
                y = tl.where(there[:, None], y - near_y[None, :], 0.0)
                each = _product(x, y, each, covariance_ptr.dtype.element_ty)
    off_x, off_y = sum_x / count, sum_y / count
    mean_x, mean_y = near_x + off_x, near_y + off_y
    covariance = total / count - off_x[:, None] * off_y[None, :]
    d_x = row % parts * TILE + tl.arange(0, TILE)
    d_y = column % parts * TILE + tl.arange(0, TILE)
    in_x, in_y = d_x < HEAD_DIM, d_y < HEAD_DIM
    inside = in_x[:, None] & in_y[None, :]
    at_x, at_y = row // parts * HEAD_DIM + d_x, column // parts * HEAD_DIM + d_y
    if row == column:
        tl.store(mean_ptr + z * 2 * HEAD_DIM + at_x, mean_x, mask=in_x)
    to = covariance_ptr + z * 4 * HEAD_DIM * HEAD_DIM
    store_halves(to + at_x[:, None] * 2 * HEAD_DIM + at_y[None, :], half, covariance, inside)
    store_halves(to + at_y[None, :] * 2 * HEAD_DIM + at_x[:, None], half, covariance, inside)
    if (column < parts) | (row >= parts):
        to = weigh_ptr + z * 2 * HEAD_DIM * HEAD_DIM
        second = covariance
        if column < parts:
            to += HEAD_DIM * HEAD_DIM
            if GROUP > 1:
                second = each / (count * GROUP) - off_x[:, None] * off_y[None, :]
            second += mean_x[:, None] * mean_y[None, :]
        store_halves(to + d_x[:, None] * HEAD_DIM + d_y[None, :], half // 2, second * scale_2, inside)
        store_halves(to + d_y[None, :] * HEAD_DIM + d_x[:, None], half // 2, second * scale_2, inside)


@triton.jit
def _times(
    matrix_ptr, half, x, x_ptr, LEAD: tl.constexpr, PART: tl.constexpr,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A symmetric matrix [DIM, DIM], whose rows are LEAD apart, times x [COLUMNS, WIDTH]. PART: it consists of blocks
    of that size on its diagonal, one after the other in memory. CHUNK: columns at once, by way of x_ptr; 0: all.
    """
    i = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    block = i // PART
    row = i[:, None] * LEAD - block[:, None] * PART
    # [COLUMNS, WIDTH]
    product = tl.zeros((COLUMNS, WIDTH), tl.float32)
    if CHUNK == 0:
        # [COLUMNS, COLUMNS]
        mask = (i[:, None] < DIM) & (i[None, :] < DIM) & (block[:, None] == block[None, :])
        high = tl.load(matrix_ptr + row + i[None, :], mask=mask, other=0.0)
        low = tl.load(matrix_ptr + half + row + i[None, :], mask=mask, other=0.0)
        x_high, x_low = halves(x, high.dtype)
        product = dot_halves(high, low, x_high, x_low, product)
    else:
        tl.debug_barrier()
        tl.store(x_ptr + i[:, None] * RANK + r[None, :], x, mask=(i[:, None] < DIM) & (r[None, :] < RANK))
        tl.debug_barrier()
        for first in tl.range(0, DIM, CHUNK):
            j = first + tl.arange(0, CHUNK)
            # [COLUMNS, CHUNK]
            mask = (i[:, None] < DIM) & (block[:, None] == first // PART)
            high = tl.load(matrix_ptr + row + j[None, :], mask=mask, other=0.0)
            low = tl.load(matrix_ptr + half + row + j[None, :], mask=mask, other=0.0)
            # [CHUNK, WIDTH]
            part = tl.load(x_ptr + j[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
            x_high, x_low = halves(part, high.dtype)
            product = dot_halves(high, low, x_high, x_low, product)
    return product


@triton.jit
def _directions_kernel(
    mean_ptr, covariance_ptr, weigh_ptr, room_ptr, first_ptr, second_ptr, half, scale,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, ROUNDS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """BOTH: the axes of [q, k] to first, what the mean is there to second. Else of k alone: scale * C W and W."""
    LEAD: tl.constexpr = 2 * HEAD_DIM
    z = tl.program_id(0).to(tl.int64)
    covariance_ptr += z * LEAD * LEAD
    weigh_ptr += z * 2 * HEAD_DIM * HEAD_DIM
    if not BOTH:
        covariance_ptr += HEAD_DIM * LEAD + HEAD_DIM
        weigh_ptr += HEAD_DIM * HEAD_DIM
    room_ptr += z * DIM * RANK
    i = tl.arange(0, COLUMNS)
    r = tl.arange(0, WIDTH)
    at = i[:, None] * RANK + r[None, :]
    inside = (i[:, None] < DIM) & (r[None, :] < RANK)
    # numbers that look random and are always the same
    turn = tl.where(inside, at, 0).to(tl.int64)
    # [COLUMNS, WIDTH]
    w = tl.where(inside, ((7919 * turn * turn + 4729 * turn) % 10007).to(tl.float32) / 10007 - 0.5, 0.0)
    seen = _times(covariance_ptr, half, w, room_ptr, LEAD, DIM, DIM, COLUMNS, RANK, WIDTH, CHUNK)
    for _ in tl.range(0, ROUNDS):
        for _ in tl.static_range(2):
            w = _times(weigh_ptr, half // 2, seen, room_ptr, HEAD_DIM, HEAD_DIM, DIM, COLUMNS, RANK, WIDTH, CHUNK)
            seen = _times(covariance_ptr, half, w, room_ptr, LEAD, DIM, DIM, COLUMNS, RANK, WIDTH, CHUNK)
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
    to_first = first_ptr + z * DIM * RANK + at
    if BOTH:  # as long as the deviation along it: spread is the eigenvalue
        weighed = _times(weigh_ptr, half // 2, seen, room_ptr, HEAD_DIM, HEAD_DIM, DIM, COLUMNS, RANK, WIDTH, CHUNK)
        w *= tl.sqrt(tl.maximum(tl.sum(seen * weighed, 0), 0.0))[None, :]
        tl.store(to_first, w.to(first_ptr.dtype.element_ty), mask=inside)
        mean = tl.load(mean_ptr + z * DIM + i, mask=i < DIM, other=0.0)
        tl.store(second_ptr + z * RANK + r, tl.sum(mean[:, None] * w, 0), mask=r < RANK)
    else:
        to_second = second_ptr + z * DIM * RANK + at
        tl.store(to_first, _finite(scale * seen).to(first_ptr.dtype.element_ty), mask=inside)
        tl.store(to_second, _finite(w).to(first_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)
