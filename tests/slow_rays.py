"""One ray at a time, in float64 and by small steps: what the ray tracer must show, without its intersections."""

from __future__ import annotations

import math

import numpy as np

from studies.demo_model.motion import HALF, Pose, poses, sizes
from studies.demo_model.table import _FLOORS, _LOOKS, _SKIES, numbers_of
from studies.demo_model.world import COLOURS, Scene, Solid

Array = np.ndarray
STEP, REACH = 0.01, 14.0


def outside(shape: str, points: Array) -> Array:
    """Below 0 inside a shape at size 1, in local coordinates [..., 3]."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    radius, height, _ = HALF[shape]
    if shape == "sphere":
        return np.sqrt(x * x + y * y + z * z) - 1
    if shape == "cube":
        return np.maximum(np.maximum(abs(x), abs(y)), abs(z)) - radius
    if shape == "cylinder":
        return np.maximum(np.hypot(x, z) - radius, abs(y) - height)
    return np.maximum(np.hypot(x, z) - radius * (height - y) / (2 * height), abs(y) - height)


class Solids:
    """The scene's solids at one time."""

    def __init__(self, scene: Scene, time: float) -> None:
        self.scene = scene
        self.parts: list[tuple[Solid, float, Pose]] = [
            *zip(scene.solids, sizes(scene), poses(scene, np.array([time])), strict=True)
        ]

    def local(self, index: int, points: Array) -> Array:
        _, size, pose = self.parts[index]
        return (points - pose.centre[0]) @ pose.rotation[0] / size

    def depth(self, index: int, points: Array) -> Array:
        return outside(self.parts[index][0].shape, self.local(index, points))

    def crossings(self, index: int, origin: Array, direction: Array) -> tuple[float, float] | None:
        """Where the ray goes in and out, by steps and then by halving."""
        steps = np.arange(0.002, REACH, STEP)
        inside = self.depth(index, origin + steps[:, None] * direction) < 0
        if not inside.any():
            return None
        first, last = np.flatnonzero(inside)[[0, -1]]
        if first == 0:
            return None
        ends = ((steps[first - 1], steps[first]), (steps[last] + STEP, steps[last]))
        return tuple(self._halved(index, origin, direction, *end) for end in ends)  # type: ignore[return-value]

    def _halved(self, index: int, origin: Array, direction: Array, out: float, within: float) -> float:
        for _ in range(60):
            middle = (out + within) / 2
            if self.depth(index, origin + middle * direction) < 0:
                within = middle
            else:
                out = middle
        return out

    def nearest(self, origin: Array, direction: Array) -> tuple[int, float, float] | None:
        met = [(i, self.crossings(i, origin, direction)) for i in range(len(self.parts))]
        hits = [(each[0], i, each[1]) for i, each in met if each]
        return None if not hits else (min(hits)[1], min(hits)[0], min(hits)[2])

    def normal(self, index: int, point: Array) -> Array:
        """The outward normal, from differences of the depth."""
        size = 1e-6
        slope = [self.depth(index, point + size * e) - self.depth(index, point - size * e) for e in np.eye(3)]
        return np.array(slope) / np.linalg.norm(slope)

    def colour(self, index: int, point: Array) -> Array:
        solid = self.parts[index][0]
        x, y, z = self.local(index, point)
        other = (0.95, 0.95, 0.93) if solid.colour not in ("white", "yellow") else (0.16, 0.16, 0.20)
        share = 0.0
        if solid.material == "striped":
            share = min(1.0, max(0.0, 0.5 - 5 * math.cos(6.2832 / 0.8 * x)))
        if solid.material == "checkered":
            wave = math.cos(3.14159 / 0.64 * x) * math.cos(3.14159 / 0.64 * y) * math.cos(3.14159 / 0.64 * z)
            share = min(1.0, max(0.0, 0.5 - 5 * wave))
        return (1 - share) * np.array(COLOURS[solid.colour]) + share * np.array(other)


class Rays:
    """Colours of single rays in a scene at one time."""

    def __init__(self, scene: Scene, time: float) -> None:
        self.scene, self.solids = scene, Solids(scene, time)
        self.light = numbers_of([scene], [0]).worlds[0, :3].double().numpy()
        zenith, horizon, self.strength = _SKIES[scene.sunset]
        self.zenith, self.horizon = np.array(zenith), np.array(horizon)

    def sky(self, direction: Array) -> Array:
        share = min(1.0, max(0.0, 2.6 * direction[1]))
        return (1 - share) * self.horizon + share * self.zenith

    def floor(self, point: Array, distance: float) -> Array:
        first, second = (np.array(colour) for colour in _FLOORS[self.scene.floor])
        x, z = point[0] + self.scene.open[18], point[2] + self.scene.open[19]
        wave = math.sin(3.14159 * x) * math.sin(3.14159 * z)
        edge = min(1.0, max(-1.0, wave * 10 / (1 + 0.01 * distance**2))) / (1 + distance**4 / 30000)
        return first + (second - first) * (0.5 + 0.5 * edge)

    def lit(self, colour: Array, normal: Array, sun: float) -> Array:
        facing = max(0.0, float(normal @ self.light)) * sun
        return colour * (0.47 + 0.12 * normal[1] + 0.58 * self.strength * facing)

    def misty(self, colour: Array, distance: float) -> Array:
        return self.horizon + (colour - self.horizon) * math.exp(-(distance**2) / 500)

    def sun(self, point: Array) -> float:
        share = 1.0
        for index, (solid, _, _) in enumerate(self.solids.parts):
            if self.solids.crossings(index, point, self.light):
                share *= 0.6 * _LOOKS[solid.material][3]
        return share

    def contact(self, point: Array) -> float:
        share = 1.0
        for _, size, pose in self.solids.parts:
            to = pose.centre[0] - point
            square = float(to @ to)
            share *= 1 - min(0.75, max(0.0, 0.9 * to[1] / math.sqrt(square) * size**2 / square))
        return share

    def glimpse(self, origin: Array, direction: Array) -> Array:
        below = -origin[1] / direction[1] if direction[1] < -1e-4 else math.inf
        met = self.solids.nearest(origin, direction)
        if met and met[1] < below:
            point = origin + met[1] * direction
            return self.lit(self.solids.colour(met[0], point), self.solids.normal(met[0], point), 1.0)
        if math.isinf(below):
            return self.sky(direction)
        colour = self.floor(origin + below * direction, 3 * below)
        return self.misty(self.lit(colour, np.array([0.0, 1, 0]), 1.0), below)

    def colour(self, origin: Array, direction: Array) -> Array:
        below = -origin[1] / direction[1] if direction[1] < -1e-4 else math.inf
        met = self.solids.nearest(origin, direction)
        if met and met[1] < below:
            return self.solid(origin, direction, *met)
        if math.isinf(below):
            return self.sky(direction)
        point, up = origin + below * direction, np.array([0.0, 1, 0])
        surface = self.lit(self.floor(point, below), up, self.sun(point + 0.002 * up)) * self.contact(point)
        return self.misty(surface, below)

    def solid(self, origin: Array, direction: Array, index: int, entry: float, out: float) -> Array:
        point = origin + entry * direction
        normal, own = self.solids.normal(index, point), self.solids.colour(index, point)
        _, _, mirror, clear, highlight = _LOOKS[self.solids.parts[index][0].material]
        facing = -float(direction @ normal)
        mirrored = direction + 2 * facing * normal
        start = point + 0.002 * normal
        sun = self.sun(start)
        share = mirror + (1 - mirror) * 0.7 * (1 - facing) ** 4 if mirror else 0.0
        value = (1 - share - clear * (1 - share)) * self.lit(own, normal, sun)
        if mirror:
            bounce = self.glimpse(start, mirrored)
            value = value + share * (self.metal(bounce, own, mirrored) if mirror > 0.3 else bounce)
        if clear:
            bent = direction - 0.35 * (normal + facing * direction)
            behind = self.glimpse(origin + (out + 0.001) * direction, bent / np.linalg.norm(bent))
            value = value + clear * (1 - share) * np.exp(-(1.02 - own) * 1.5 * (out - entry)) * behind
        return value + highlight * math.exp(24 * (float(mirrored @ self.light) - 1)) * sun

    def metal(self, bounce: Array, own: Array, direction: Array) -> Array:
        grey = float(bounce @ np.array([0.3, 0.6, 0.1])) * (1 - 0.75 * min(1.0, max(0.0, -2.2 * direction[1])))
        return (0.25 * bounce + 0.75 * grey) * own * 1.15
