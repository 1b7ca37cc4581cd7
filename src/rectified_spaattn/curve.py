"""Orders in which the tokens of a (T, H, W) grid are laid out before they are cut into blocks.

Every function returns the raster indices (t * H * W + h * W + w) of all T*H*W tokens in the order of the curve.
"""

from collections.abc import Callable, Iterator

Vector = tuple[int, int, int]


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


# "content" starts from the curve; every call then sorts what it tiles (method/arrange.py)
CONTENT = "content"
ORDERS: dict[str, Callable[[Vector, int], list[int]]] = {
    "gilbert": gilbert,
    "tile": tile,
    "raster": raster,
    CONTENT: gilbert,
}


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
