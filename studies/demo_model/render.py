"""Pictures of scenes: an analytic ray tracer in which every step is one batched operation over all rays.

Solids are convex: the common inside of a quadric and three slabs, met in local coordinates. A ray that meets a solid or
the floor sends one ray to the light, one that bounces off (metal, glass) and one that goes through (glass). Vectors are
tuples of three tensors, so that torch.compile makes a few kernels of all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .table import Numbers, numbers_of
from .world import Scene

Vector = tuple[Tensor, Tensor, Tensor]
VIEW = 0.364  # half the picture's height at distance 1: a field of view of 40 degrees
SAMPLES = 2  # rays a pixel along each axis
NEAR, NOWHERE = 1e-3, 1e4
STRIPE, CHECK = 0.8, 0.64  # period of stripes, width of checks, at size 1
AMBIENT = 0.47


@dataclass(frozen=True)
class Bodies:
    """The scenes' solids, K of them first: columns [K, 1, B, 1, 1, 1] and, of poses, [K, 1, B, T, 1, 1]."""

    quadric: tuple[Tensor, ...]
    half: Vector
    size: Tensor
    colour: Vector
    other: Vector
    look: tuple[Tensor, ...]
    centre: Vector
    axes: tuple[Vector, Vector, Vector]  # rows of the rotation from local to world


@dataclass(frozen=True)
class Hit:
    """The nearest solid that rays meet: where they go in and out, and what is there. `entry` is NOWHERE without one."""

    entry: Tensor
    out: Tensor
    normal: Vector
    colour: Vector
    reflection: Tensor
    transmission: Tensor
    highlight: Tensor


def dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(a: Vector, b: Vector, scale: Tensor | float) -> Vector:
    """a + scale * b."""
    return a[0] + scale * b[0], a[1] + scale * b[1], a[2] + scale * b[2]


def unit(a: Vector) -> Vector:
    scale = torch.rsqrt(dot(a, a).clamp_min(1e-12))
    return a[0] * scale, a[1] * scale, a[2] * scale


def mix(a: Vector, b: Vector, share: Tensor) -> Vector:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]), a[2] + share * (b[2] - a[2])


def choose(where: Tensor, a: Vector, b: Vector) -> Vector:
    return torch.where(where, a[0], b[0]), torch.where(where, a[1], b[1]), torch.where(where, a[2], b[2])


def together(a: Vector, b: Vector) -> Vector:
    """Two sets of rays [1, ...] as one, [2, ...]."""
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])


def split(a: Vector) -> tuple[Vector, Vector]:
    return (a[0][:1], a[1][:1], a[2][:1]), (a[0][1:], a[1][1:], a[2][1:])


def three(columns: Tensor) -> Vector:
    return columns[0], columns[1], columns[2]


def bodies_of(numbers: Numbers) -> Bodies:
    fixed = numbers.solids.permute(2, 1, 0)[:, :, None, :, None, None, None]
    pose = numbers.poses.permute(3, 2, 0, 1)[:, :, None, :, :, None, None]
    return Bodies(
        quadric=(fixed[0], fixed[1], fixed[2], fixed[3]),
        half=three(fixed[4:7]),
        size=fixed[7],
        colour=three(fixed[8:11]),
        other=three(fixed[11:14]),
        look=tuple(fixed[14:19]),
        centre=three(pose[0:3]),
        axes=(three(pose[3:6]), three(pose[6:9]), three(pose[9:12])),
    )


def to_local(bodies: Bodies, vector: Vector) -> Vector:
    x, y, z = (
        bodies.axes[0][i] * vector[0] + bodies.axes[1][i] * vector[1] + bodies.axes[2][i] * vector[2] for i in range(3)
    )
    return x / bodies.size, y / bodies.size, z / bodies.size


def local_ray(bodies: Bodies, origin: Vector, direction: Vector) -> tuple[Vector, Vector]:
    return to_local(bodies, along(origin, bodies.centre, -1.0)), to_local(bodies, direction)


def cross_slabs(half: Vector, origin: Vector, direction: Vector) -> tuple[list[Tensor], Tensor]:
    """Where a local ray enters each of the three slabs, and where it first leaves one."""
    entries, out = [], torch.full_like(direction[0], NOWHERE)
    for h, o, d in zip(half, origin, direction, strict=True):
        inverse = 1 / torch.where(d.abs() < 1e-7, torch.full_like(d, 1e-7), d)
        middle, reach = -o * inverse, h * inverse.abs()
        entries.append(middle - reach)
        out = torch.minimum(out, middle + reach)
    return entries, out


def cross_quadric(bodies: Bodies, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """Where a local ray enters and leaves the quadric; of a double cone, its lower half. Entry > out without a hit."""
    a, c, d, e = bodies.quadric
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    square = a * (dx * dx + dz * dz) + c * dy * dy
    square = torch.where(square.abs() < 1e-6, torch.full_like(square, 1e-6), square)
    middle = a * (ox * dx + oz * dz) + c * oy * dy + 0.5 * d * dy
    rest = a * (ox * ox + oz * oz) + c * oy * oy + d * oy + e
    inside = middle * middle - square * rest
    root = torch.sqrt(inside.clamp_min(0))
    first, second = (-middle - root) / square, (-middle + root) / square
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    convex, upwards = square > 0, dy > 0
    nowhere = torch.full_like(low, NOWHERE)
    entry = torch.where(convex, low, torch.where(upwards, -nowhere, high))
    out = torch.where(convex, high, torch.where(upwards, low, nowhere))
    return torch.where(inside > 0, entry, nowhere), out


def interval(bodies: Bodies, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """Where a world ray goes into a solid and out of it; entry > out where it misses."""
    origin, direction = local_ray(bodies, origin, direction)
    entries, out = cross_slabs(bodies.half, origin, direction)
    entry, leave = cross_quadric(bodies, origin, direction)
    for other in entries:
        entry = torch.maximum(entry, other)
    return entry, torch.minimum(out, leave)


def pattern(bodies: Bodies, point: Vector) -> Tensor:
    """Share of the second colour at a local point: stripes across x, or checks in three dimensions."""
    x, y, z = point
    stripes = (0.5 - 5 * torch.cos((6.2832 / STRIPE) * x)).clamp(0, 1)
    turn = 3.14159 / CHECK
    checks = (0.5 - 5 * torch.cos(turn * x) * torch.cos(turn * y) * torch.cos(turn * z)).clamp(0, 1)
    return bodies.look[0] * stripes + bodies.look[1] * checks


def meet(bodies: Bodies, origin: Vector, direction: Vector) -> Hit:
    """What rays meet of one solid."""
    origin, direction = local_ray(bodies, origin, direction)
    slabs, out = cross_slabs(bodies.half, origin, direction)
    entry, leave = cross_quadric(bodies, origin, direction)
    out = torch.minimum(out, leave)
    best = torch.maximum(torch.maximum(entry, slabs[0]), torch.maximum(slabs[1], slabs[2]))
    point = along(origin, direction, best)
    a, c, d, _ = bodies.quadric
    normal = (a * point[0], c * point[1] + 0.5 * d, a * point[2])
    for axis in range(3):
        flat = [torch.zeros_like(best)] * 3
        flat[axis] = -torch.sign(direction[axis])
        normal = choose(slabs[axis] >= best, (flat[0], flat[1], flat[2]), normal)
    hit = (best < out) & (best > NEAR)
    world = (dot(bodies.axes[0], normal), dot(bodies.axes[1], normal), dot(bodies.axes[2], normal))
    return Hit(
        entry=torch.where(hit, best, torch.full_like(best, NOWHERE)),
        out=out,
        normal=unit(world),
        colour=mix(bodies.colour, bodies.other, pattern(bodies, point)),
        reflection=bodies.look[2],
        transmission=bodies.look[3],
        highlight=bodies.look[4],
    )


def nearest(bodies: Bodies, origin: Vector, direction: Vector) -> Hit:
    """What rays [R, B, T, H, W] meet first."""
    every = meet(bodies, origin, direction)
    best = Hit(**{name: _kth(value, 0) for name, value in vars(every).items()})
    for k in range(1, len(every.entry)):
        other = Hit(**{name: _kth(value, k) for name, value in vars(every).items()})
        closer = other.entry < best.entry
        best = Hit(
            entry=torch.minimum(other.entry, best.entry),
            out=torch.where(closer, other.out, best.out),
            normal=choose(closer, other.normal, best.normal),
            colour=choose(closer, other.colour, best.colour),
            reflection=torch.where(closer, other.reflection, best.reflection),
            transmission=torch.where(closer, other.transmission, best.transmission),
            highlight=torch.where(closer, other.highlight, best.highlight),
        )
    return best


def _kth(value: Tensor | Vector, k: int) -> Tensor | Vector:
    return value[k] if isinstance(value, Tensor) else (value[0][k], value[1][k], value[2][k])


@dataclass(frozen=True)
class World:
    """Light, sky and floor: columns [B, 1, 1, 1] of `Numbers.worlds`."""

    light: Vector
    zenith: Vector
    horizon: Vector
    floor: Vector
    checks: Vector
    offset: tuple[Tensor, Tensor]
    strength: Tensor


def world_of(numbers: Numbers) -> World:
    w = numbers.worlds.T[:, :, None, None, None]
    return World(three(w[0:3]), three(w[3:6]), three(w[6:9]), three(w[9:12]), three(w[12:15]), (w[15], w[16]), w[17])


def sky(world: World, direction: Vector) -> Vector:
    return mix(world.horizon, world.zenith, (2.6 * direction[1]).clamp(0, 1))


def floor_colour(world: World, point: Vector, distance: Tensor) -> Vector:
    """Checks 1 m wide whose edges are sharp nearby and whose contrast fades far away."""
    x, z = point[0] + world.offset[0], point[2] + world.offset[1]
    square = distance * distance
    wave = torch.sin(3.14159 * x) * torch.sin(3.14159 * z)
    sharp = (wave * 10 / (1 + 0.01 * square)).clamp(-1, 1) / (1 + square * square / 30000)
    return mix(world.floor, world.checks, 0.5 + 0.5 * sharp)


def far_away(world: World, colour: Vector, distance: Tensor) -> Vector:
    return mix(colour, world.horizon, 1 - torch.exp(-distance * distance / 500))


def lit(colour: Vector, normal: Vector, world: World, light: Tensor | float) -> Vector:
    """A matte colour under the sky (more from above) and under the share `light` of the sun."""
    facing = dot(normal, world.light).clamp_min(0) * light
    shade = AMBIENT + 0.12 * normal[1] + 0.58 * world.strength * facing
    return colour[0] * shade, colour[1] * shade, colour[2] * shade


def floor_distance(origin: Vector, direction: Vector) -> Tensor:
    down = direction[1] < -1e-4
    distance = -origin[1] / torch.where(down, direction[1], torch.full_like(direction[1], -1.0))
    return torch.where(down, distance, torch.full_like(distance, NOWHERE))


def glimpse(bodies: Bodies, world: World, origin: Vector, direction: Vector) -> Vector:
    """Colours along rays, with no shadow, no mirror and no glass: what other objects reflect or let through."""
    hit = nearest(bodies, origin, direction)
    below = floor_distance(origin, direction)
    point = along(origin, direction, below)
    ground = lit(floor_colour(world, point, 3 * below), (below * 0, below * 0 + 1, below * 0), world, 1.0)
    ground = choose(below < NOWHERE, far_away(world, ground, below), sky(world, direction))
    return choose(hit.entry < below, lit(hit.colour, hit.normal, world, 1.0), ground)


def sunlight(bodies: Bodies, world: World, point: Vector) -> Tensor:
    """Share of the sun that reaches points; glass takes half of it."""
    entry, out = interval(bodies, point, world.light)
    return torch.where((entry < out) & (entry > NEAR), 0.6 * bodies.look[3], 1.0).prod(0)


def contact_shade(bodies: Bodies, point: Vector) -> Tensor:
    """How much of the sky a floor point sees past the solids, each taken for a ball."""
    to = along(bodies.centre, point, -1.0)
    square = dot(to, to).clamp_min(1e-4)
    hidden = 0.9 * to[1] * torch.rsqrt(square) * bodies.size * bodies.size / square
    return (1 - hidden.clamp(0, 0.75)).prod(0)


def tinted(bounce: Vector, colour: Vector, direction: Vector) -> Vector:
    """What metal of a colour shows of its surroundings: little of their hue, and less light from below."""
    grey = (0.3 * bounce[0] + 0.6 * bounce[1] + 0.1 * bounce[2]) * (1 - 0.75 * (-2.2 * direction[1]).clamp(0, 1))
    dull = mix(bounce, (grey, grey, grey), torch.full_like(grey, 0.75))
    return dull[0] * colour[0] * 1.15, dull[1] * colour[1] * 1.15, dull[2] * colour[2] * 1.15


def colours(numbers: Numbers, origin: Vector, direction: Vector) -> Vector:
    """Red, green and blue in [0, 1] along rays: origin [1, B, T, 1, 1], direction [1, B, T, H, W]."""
    bodies, world = bodies_of(numbers), world_of(numbers)
    hit = nearest(bodies, origin, direction)
    below = floor_distance(origin, direction)
    solid = hit.entry < below
    seen = solid | (below < NOWHERE)
    distance = torch.where(seen, torch.minimum(hit.entry, below), torch.full_like(below, 1.0))
    zero = torch.zeros_like(distance)
    point = along(origin, direction, distance)
    normal = choose(solid, hit.normal, (zero, zero + 1, zero))
    start = along(point, normal, 2 * NEAR)
    sun = sunlight(bodies, world, start)
    base = choose(solid, hit.colour, floor_colour(world, point, distance))
    shade = torch.where(solid, 1.0, contact_shade(bodies, point))
    surface = lit(base, normal, world, sun)
    surface = (surface[0] * shade, surface[1] * shade, surface[2] * shade)

    facing = -dot(direction, hit.normal)
    edge = (1 - facing.clamp(0, 1)) ** 4
    mirrored = along(direction, hit.normal, 2 * facing)
    reflection = torch.where(hit.reflection > 0, hit.reflection + (1 - hit.reflection) * 0.7 * edge, zero)
    through = unit(along(direction, along(hit.normal, direction, facing), -0.35))
    thick = (hit.out - hit.entry).clamp(0, 4)
    leave = along(origin, direction, hit.out.clamp(0, NOWHERE) + NEAR)
    bounce, behind = split(glimpse(bodies, world, together(start, leave), together(mirrored, through)))
    bounce = choose(hit.reflection > 0.3, tinted(bounce, hit.colour, mirrored), bounce)
    let = hit.transmission * (1 - reflection)
    own = 1 - reflection - let
    shine = hit.highlight * torch.exp(24 * (dot(mirrored, world.light) - 1)) * sun
    result = []
    for i in range(3):
        clear = torch.exp(-(1.02 - hit.colour[i]) * 1.5 * thick)
        value = own * surface[i] + reflection * bounce[i] + let * clear * behind[i] + shine
        result.append(torch.where(solid, value, surface[i]))
    picture = far_away(world, (result[0], result[1], result[2]), torch.where(solid, 0.0, distance))
    return choose(seen, picture, sky(world, direction))


def camera_rays(numbers: Numbers, height: int, width: int) -> tuple[Vector, Vector]:
    """Origins [1, B, T, 1, 1] and unit directions [1, B, T, height, width] of the rays through the pixels' middles."""
    cameras = numbers.cameras.permute(2, 0, 1)[:, None, ..., None, None]
    options = {"device": cameras.device, "dtype": cameras.dtype}
    scale = 2 * VIEW / min(height, width)
    down = (torch.arange(height, **options) + 0.5 - height / 2)[:, None] * scale
    right = (torch.arange(width, **options) + 0.5 - width / 2)[None, :] * scale
    axes = (three(cameras[3:6]), three(cameras[6:9]), three(cameras[9:12]))
    direction = along(along(axes[2], axes[0], right), axes[1], -down)
    return three(cameras[0:3]), unit(direction)


def render_numbers(numbers: Numbers, height: int = 64, width: int = 64) -> Tensor:
    """Videos [B, 3, T, height, width] in [-1, 1], in the numbers' dtype and on their device."""
    origin, direction = camera_rays(numbers, height * SAMPLES, width * SAMPLES)
    rays = torch.cat(colours(numbers, origin, direction)).transpose(0, 1).clamp(0, 1)
    pixels = rays.unflatten(-1, (width, SAMPLES)).unflatten(-3, (height, SAMPLES)).mean((-1, -3))
    return pixels * 2 - 1


def render(
    scenes: Sequence[Scene], num_frames: int = 16, height: int = 64, width: int = 64, device: str = "cpu"
) -> Tensor:
    """Videos float32 [B, 3, num_frames, height, width] in [-1, 1]. ValueError without a scene or below size 1."""
    if not scenes or min(num_frames, height, width) < 1:
        raise ValueError(
            f"render: needs a scene and sizes of at least 1, got {(len(scenes), num_frames, height, width)}"
        )
    return render_numbers(numbers_of(scenes, range(num_frames), num_frames).to(device), height, width)
