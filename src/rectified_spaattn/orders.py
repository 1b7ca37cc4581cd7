"""Blocks: how the tokens of a layout are cut, and the orders in space that lay them out before.

An order in space gives the raster indices (t * H * W + h * W + w) of all tokens of a (T, H, W) grid along its curve.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product

import torch

from .config import SparseConfig
from .layout import TokenLayout, places_of

Vector = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """What follows from a layout and a config: which token is in which block. Made by `blocks_of`, which caches.

    block_size   b, tokens a block
    leftover     tokens that could be tiled, but fill no whole block; they come first in `isolated`
    by_content   every call sorts its tiled tokens, head by head: `tiled` then says which they are, not where
    tiled        int64 [nb*b], place in the sequence of every tiled token, block after block
    isolated     int64 [S - nb*b], place in the sequence of every other token: leftover, then those that stand alone
    apart        int64 [A], which of `isolated` attend to each other only; causal: each to those before it and to itself
    neighbours   bool [nb, nb], blocks that touch in 3-D (26-neighbourhood of their tokens), themselves included
    first_frame  bool [nb], blocks that hold a token of frame 0

    The last two are empty where the layout has no grid or blocks are by content. Tensors live on the CPU; `on(device)`
    gives the same blocks with their tensors there.
    """

    block_size: int
    leftover: int
    by_content: bool
    tiled: torch.Tensor
    isolated: torch.Tensor
    apart: torch.Tensor
    causal: bool
    neighbours: torch.Tensor
    first_frame: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """nb"""
        return self.tiled.numel() // self.block_size

    @property
    def sequence(self) -> int:
        """The number of all tokens but padding."""
        return self.tiled.numel() + self.isolated.numel()

    @property
    def text(self) -> int:
        """The number of tokens that stand alone."""
        return self.isolated.numel() - self.leftover

    @cached_property
    def places(self) -> torch.Tensor:
        """int32 [rows]: place in the sequence of tiled and then isolated tokens, -1 up to a whole number of blocks."""
        places = torch.cat([self.tiled, self.isolated])
        return torch.nn.functional.pad(places, (0, -len(places) % self.block_size), value=-1).int()

    @cached_property
    def all_text(self) -> torch.Tensor:
        """bool [1, text]: that every token which stands alone is valid."""
        return torch.ones(1, self.text, dtype=torch.bool, device=self.isolated.device)

    @cached_property
    def attending(self) -> torch.Tensor:
        """int64 [S - nb*b - A]: which of `isolated` attend to every token."""
        alone = torch.ones(self.isolated.numel(), dtype=torch.bool, device=self.isolated.device)
        alone[self.apart] = False
        return alone.nonzero().flatten()

    @cached_property
    def idle(self) -> torch.Tensor | None:
        """bool [rows / b]: blocks of `places` of which no query attends to every token; None where there is no such."""
        if not self.apart.numel():
            return None
        idle = self.places < 0
        idle[self.tiled.numel() + self.apart] = True
        return idle.view(-1, self.block_size).all(1)

    def on(self, device: torch.device) -> "Blocks":
        """The same blocks with their tensors on `device`; cached."""
        if device.type == "cpu":
            return self
        if device not in self._moved:
            names = [each.name for each in fields(self) if isinstance(getattr(self, each.name), torch.Tensor)]
            moved = replace(self, **{name: getattr(self, name).to(device) for name in names})
            _ = moved.places, moved.all_text  # made while a CUDA graph is captured they would be part of it
            self._moved[device] = moved
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, "Blocks"]:
        return {}


def blocks_of(layout: TokenLayout, config: SparseConfig) -> Blocks:
    """The blocks of a layout under config.order and config.block_size; cached.

    Raises ValueError for an order in space where the layout has no grid.
    """
    if layout.grid is None and config.order in CURVES:
        raise ValueError(
            f"order: got {config.order!r} for tokens that lie in no grid; allowed: 'content', which needs none."
        )
    return _blocks(layout, config.order, config.block_size)


@lru_cache(maxsize=64)
def _blocks(layout: TokenLayout, order: str, block_size: int) -> Blocks:
    places = layout.video_tokens
    if layout.grid is not None:  # an order by content starts from the curve of the paper
        curve = torch.tensor(CURVES.get(order, gilbert)(layout.grid, block_size), dtype=torch.int64, device="cpu")
        tileable = torch.zeros(layout.sequence, dtype=torch.bool, device="cpu")
        tileable[places] = True
        places = curve + layout.grid_start
        places = places[tileable[places]]
    num_blocks = len(places) // block_size
    tiled, leftover = places[: num_blocks * block_size], places[num_blocks * block_size :]
    neighbours = torch.zeros(0, 0, dtype=torch.bool, device="cpu")
    first_frame = torch.zeros(0, dtype=torch.bool, device="cpu")
    if layout.grid is not None and order in CURVES:
        t, h, w = layout.grid
        block_of = torch.full((t * h * w,), -1, dtype=torch.int64, device="cpu")  # -1: in no block
        block_of[tiled - layout.grid_start] = torch.arange(len(tiled), device="cpu") // block_size
        neighbours = _touching(block_of.view(t, h, w), num_blocks)
        first_frame = torch.zeros(num_blocks, dtype=torch.bool, device="cpu")
        in_frame_0 = block_of[: h * w]
        first_frame[in_frame_0[in_frame_0 >= 0]] = True
    return Blocks(
        block_size=block_size,
        leftover=len(leftover),
        by_content=order not in CURVES,
        tiled=layout.place[tiled],
        isolated=layout.place[torch.cat([leftover, layout.text_tokens])],
        apart=len(leftover) + places_of(layout.apart_text),
        causal=layout.causal,
        neighbours=neighbours,
        first_frame=first_frame,
    )


def _touching(block_of: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """bool [nb, nb]: blocks with tokens at most one step apart along every axis. block_of: [T, H, W], -1 for none."""
    touching = torch.eye(num_blocks, dtype=torch.bool, device="cpu")
    half_space = [offset for offset in product((0, 1), (-1, 0, 1), (-1, 0, 1)) if offset > (0, 0, 0)]
    for offset in half_space:
        near, far = block_of, block_of
        for axis, step in enumerate(offset):
            length = max(block_of.shape[axis] - abs(step), 0)
            near = near.narrow(axis, max(-step, 0) if length else 0, length)
            far = far.narrow(axis, max(step, 0) if length else 0, length)
        pairs = (near >= 0) & (far >= 0)
        touching[near[pairs], far[pairs]] = True
    return touching | touching.T


def raster(grid: Vector, block_size: int) -> list[int]:
    """The order the model itself uses: width fastest, time slowest."""
    t, h, w = grid
    return list(range(t * h * w))


def tile(grid: Vector, block_size: int) -> list[int]:
    """Fixed boxes of `block_size` tokens in raster order; what no whole box covers comes last."""
    boxes = _box_shape(grid, block_size)
    t, h, w = grid
    if boxes is None:
        return raster(grid, block_size)
    bt, bh, bw = boxes
    inside = (t // bt * bt, h // bh * bh, w // bw * bw)
    order = [
        (t0 + dt) * h * w + (h0 + dh) * w + (w0 + dw)
        for t0 in range(0, inside[0], bt)
        for h0 in range(0, inside[1], bh)
        for w0 in range(0, inside[2], bw)
        for dt in range(bt)
        for dh in range(bh)
        for dw in range(bw)
    ]
    covered = set(order)
    return order + [i for i in range(t * h * w) if i not in covered]


def gilbert(grid: Vector, block_size: int) -> list[int]:
    """Generalised Hilbert curve through a box of any size (J. Cerveny's construction, 3-D case).

    Consecutive tokens are neighbours in the grid, save for a few diagonal steps where a side is odd.
    """
    t, h, w = grid
    axes: list[Vector] = [(t, 0, 0), (0, h, 0), (0, 0, w)]
    axes.sort(key=lambda axis: -sum(axis))
    return [x * h * w + y * w + z for x, y, z in _walk((0, 0, 0), axes[0], axes[1], axes[2])]


CURVES: dict[str, Callable[[Vector, int], list[int]]] = {"gilbert": gilbert, "tile": tile, "raster": raster}


def _box_shape(grid: Vector, block_size: int) -> Vector | None:
    """The most cube-like (t, h, w) with t*h*w = block_size that fits in the grid; None where none fits."""
    divisors = [d for d in range(1, block_size + 1) if block_size % d == 0]
    shapes = [(a, b, block_size // (a * b)) for a in divisors for b in divisors if block_size % (a * b) == 0]
    fitting = [s for s in shapes if all(side <= length for side, length in zip(s, grid, strict=True))]
    return min(fitting, key=lambda s: (sum(s), s), default=None)


def _walk(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Fill the box spanned by the axis vectors a, b, c from corner `start`; the curve leaves at the far end of `a`."""
    na, nb, nc = _length(a), _length(b), _length(c)
    if nb == 1 and nc == 1:
        yield from _line(start, a)
        return
    if na == 1 and nc == 1:
        yield from _line(start, b)
        return
    if na == 1 and nb == 1:
        yield from _line(start, c)
        return

    # Halves of even length keep the end points of the parts adjacent.
    a1, b1, c1 = _half(a), _half(b), _half(c)
    a2, b2, c2 = _sub(a, a1), _sub(b, b1), _sub(c, c1)
    ua, ub, uc = _unit(a), _unit(b), _unit(c)

    if 2 * na > 3 * nb and 2 * na > 3 * nc:  # long along a: two boxes in a row
        parts = [(start, a1, b, c), (_add(start, a1), a2, b, c)]
    elif 3 * nb > 4 * nc:  # flat along c: up along b, across, and down again
        parts = [
            (start, b1, c, a1),
            (_add(start, b1), a, b2, c),
            (_add(start, _sub(a, ua), _sub(b1, ub)), _neg(b1), c, _neg(a2)),
        ]
    elif 3 * nc > 4 * nb:  # flat along b: the same with c in the place of b
        parts = [
            (start, c1, a1, b),
            (_add(start, c1), a, b, c2),
            (_add(start, _sub(a, ua), _sub(c1, uc)), _neg(c1), _neg(a2), b),
        ]
    else:  # about a cube: five boxes
        parts = [
            (start, b1, c1, a1),
            (_add(start, b1), c, a1, b2),
            (_add(start, _sub(b1, ub), _sub(c, uc)), a, _neg(b1), _neg(c2)),
            (_add(start, _sub(a, ua), b1, _sub(c, uc)), _neg(c), _neg(a2), b2),
            (_add(start, _sub(a, ua), _sub(b1, ub)), _neg(b1), c1, _neg(a2)),
        ]
    for part in parts:
        yield from _walk(*part)


def _line(start: Vector, axis: Vector) -> Iterator[Vector]:
    x, y, z = start
    dx, dy, dz = _unit(axis)
    for i in range(_length(axis)):
        yield (x + i * dx, y + i * dy, z + i * dz)


def _length(v: Vector) -> int:
    return abs(v[0] + v[1] + v[2])


def _unit(v: Vector) -> Vector:
    n = _length(v)
    return (v[0] // n, v[1] // n, v[2] // n)


def _half(v: Vector) -> Vector:
    n = _length(v)
    half = n // 2
    if half % 2 == 1 and n > 2:
        half += 1
    x, y, z = _unit(v)
    return (x * half, y * half, z * half)


def _add(*vectors: Vector) -> Vector:
    return (sum(v[0] for v in vectors), sum(v[1] for v in vectors), sum(v[2] for v in vectors))


def _sub(u: Vector, v: Vector) -> Vector:
    return (u[0] - v[0], u[1] - v[1], u[2] - v[2])


def _neg(v: Vector) -> Vector:
    return (-v[0], -v[1], -v[2])
