"""How the objects of a scene move: closed-form paths that roll without slipping, fall, bounce and push.

World: metres, x to the right, y up, z to the viewer, the floor at y = 0. A clip lasts from time 0 to 1. Nothing here
is random: what a caption leaves open comes from `Scene.open`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rectified_spaattn.lab.demo_model.words import ACROSS

from .world import Scene

Array = np.ndarray
Half = tuple[float, float, float]
HALF: dict[str, Half] = {  # half extents at size 1, upright
    "sphere": (1.0, 1.0, 1.0),
    "cube": (0.8, 0.8, 0.8),
    "cylinder": (0.76, 0.9, 0.76),
    "cone": (0.98, 1.05, 0.98),
}
FAR = 3.4  # a main object at this |x| is out of the picture


@dataclass(frozen=True)
class Pose:
    """Where an object is and how it is turned: centre [T, 3], rotation [T, 3, 3] (local to world)."""

    centre: Array
    rotation: Array


@dataclass(frozen=True)
class View:
    """A camera: position [T, 3] and axes [T, 3, 3] whose rows are right, up and forward."""

    position: Array
    axes: Array


def turn(axis: int, angle: Array) -> Array:
    """Rotations [T, 3, 3] about a coordinate axis by `angle` [T], counterclockwise as seen from its end."""
    result = np.zeros((len(angle), 3, 3))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = np.cos(angle), np.sin(angle)
    result[:, axis, axis] = 1
    result[:, first, first] = result[:, second, second] = cos
    result[:, first, second], result[:, second, first] = -sin, sin
    return result


def fall(times: Array, height: float, first: float, restitution: float) -> Array:
    """Height [T] over the floor of what falls from `height`, lands at time `first` and bounces."""
    gravity = 2 * height / first**2
    result = np.maximum(0.0, height - gravity * times**2 / 2)
    landing, speed = first, gravity * first * restitution
    while landing < times[-1] and speed > 0.05 * gravity * first:
        since = times - landing
        result = np.maximum(result, np.where(since > 0, speed * since - gravity * since**2 / 2, 0.0))
        landing, speed = landing + 2 * speed / gravity, speed * restitution
    return result


def sizes(scene: Scene) -> list[float]:
    """Size of every object; `HALF` times it are its half extents."""
    open_ = scene.open
    count = len(scene.solids)
    if scene.motion == "circle":
        return [0.46 + 0.06 * open_[0], 0.66 + 0.06 * open_[1], 0.5][:count]
    if scene.motion == "hit":
        return [0.58 + 0.08 * open_[0], 0.56 + 0.08 * open_[1], 0.5][:count]
    main = (0.84 if count == 1 else 0.68) + 0.1 * open_[0]
    return [main, 0.46 if scene.place == "behind" else 0.58 + 0.08 * open_[1], 0.5][:count]


def contact(scene: Scene) -> float:
    """Distance along x between the centres of the first two objects when they touch; never less than it is."""
    (first, second), (a, b) = (solid.shape for solid in scene.solids[:2]), sizes(scene)[:2]
    if first == second == "sphere":
        return 2 * math.sqrt(a * b)
    return HALF[first][0] * a + HALF[second][0] * b


def _across(scene: Scene, times: Array) -> Array:
    """x [T] of a main object that crosses, comes in or leaves."""
    jitter = 0.3 * (scene.open[2] - 0.5)
    sign = 1.0 if scene.motion in ("right", "enter left", "leave right") else -1.0
    if scene.motion.startswith("enter"):
        return sign * (jitter - FAR * (1 - times) ** 1.7)
    if scene.motion.startswith("leave"):
        return sign * (jitter + FAR * times**1.7)
    return sign * (jitter + (2 * times - 1) * (1.4 + 0.2 * scene.open[3]))


def _hit(scene: Scene, times: Array) -> tuple[Array, Array]:
    """x [T] of the object that hits and of the one that is hit."""
    sign = 1.0 if scene.open[2] < 0.5 else -1.0
    start, rest, touch = -1.85, 0.45, 0.42 + 0.12 * scene.open[3]
    end = rest - contact(scene)
    speed = (end - start) / touch
    since = np.maximum(times - touch, 0)
    slowed = (1 - np.exp(-1.2 * since)) / 1.2
    first = start + speed * np.minimum(times, touch) + 0.15 * speed * slowed
    return sign * first, sign * (rest + 0.85 * speed * slowed)


def _spots(scene: Scene) -> list[tuple[float, float]]:
    """(x, z) of every object where its motion doesn't say otherwise."""
    a, b, c, d = scene.open[4:8]
    side = 1.0 if a < 0.5 else -1.0
    if scene.motion == "circle":
        return [(0.0, 0.0), (0.2 * (b - 0.5), 0.2 * (c - 0.5)), (1.7 * side, -2.4)]
    if scene.motion == "hit":
        return [(0.0, 0.2), (0.0, 0.2), (0.9 * side, -2.0)]
    if scene.place == "in front of":
        return [(0.0, 0.5), (side * (0.25 + 0.5 * b), -1.5 - 0.3 * c), (-side * (1.1 + 0.4 * d), -2.0)]
    if scene.place == "behind":
        return [(0.0, -0.6), (side * (0.2 + 0.5 * b), 1.2 + 0.2 * c), (-side * (1.1 + 0.4 * d), -2.3)]
    if scene.motion in ("closer", "away"):
        alone = len(scene.solids) == 1
        first = (0.5 * (b - 0.5), 0.0) if alone else (-side * 0.8, 0.0)
        return [first, (side * (0.95 + 0.15 * b), -0.5 + 0.6 * c), (side * (1.8 + 0.3 * d), -2.6)]
    if scene.place == "next to":
        return [(-side * 0.8, 0.1), (side * (0.95 + 0.15 * b), -0.5 + 0.6 * c), (0.4 * (d - 0.5), -2.5)]
    return [(0.7 * (b - 0.5), 0.5 * (c - 0.5))]


def _upright(scene: Scene, index: int, x: Array | float, y: Array | float, z: Array | float, times: Array) -> Pose:
    """An object that stands, turned by an open angle about the vertical; y is its height over the floor."""
    solid, size = scene.solids[index], sizes(scene)[index]
    yaw = 0.15 if solid.shape == "cube" and scene.motion == "hit" else 1.1 * (scene.open[10 + index] - 0.5)
    floor = HALF[solid.shape][1] * size
    centre = np.stack([np.broadcast_to(value, times.shape) for value in (x, y + floor, z)], 1)
    return Pose(centre, turn(1, np.full(len(times), yaw)))


def _rolled(pose: Pose, path: Array, axis: int, radius: float) -> Pose:
    """The pose turned by what a wheel of `radius` turns on its way along `path` [T]; axis 0 for x, 2 for z."""
    distance = path - path[0]
    about = turn(2, -distance / radius) if axis == 0 else turn(0, distance / radius)
    return Pose(pose.centre, about @ pose.rotation)


def _main(scene: Scene, times: Array) -> Pose:
    """The main object's pose, for every motion but "hit"."""
    (x, z), size, shape = _spots(scene)[0], sizes(scene)[0], scene.solids[0].shape
    if scene.motion in ACROSS:
        path = _across(scene, times)
        pose = _upright(scene, 0, path, 0.0, z, times)
        return _rolled(pose, path, 0, size) if scene.rolls else pose
    if scene.motion in ("closer", "away"):
        sign = 1.0 if scene.motion == "closer" else -1.0
        path = -0.6 + sign * (2 * times - 1) * (1.75 + 0.2 * scene.open[3])
        return _lengthwise(scene, x, path, times)
    if scene.motion == "circle":
        radius, angle = 1.45 + 0.15 * scene.open[3], 2 * math.pi * scene.open[2] + 1.5 * math.pi * times
        pose = _upright(scene, 0, radius * np.cos(angle), 0.0, -radius * np.sin(angle), times)
        return Pose(pose.centre, turn(1, angle) @ pose.rotation)
    heights: dict[str, Callable[[], Array]] = {
        "bounce": lambda: fall(times + 0.1 * scene.open[2], 1.1 + 0.3 * scene.open[3], 0.22, 0.88),
        "drop": lambda: fall(times, 3.4, 0.36 + 0.08 * scene.open[2], 0.36 if shape != "cone" else 0.2),
    }
    pose = _upright(scene, 0, x, heights[scene.motion]() if scene.motion in heights else 0.0, z, times)
    if scene.motion == "spin":
        return Pose(pose.centre, turn(1, 1.3 * math.pi * times) @ pose.rotation)
    return pose


def _lengthwise(scene: Scene, x: float, path: Array, times: Array) -> Pose:
    """A main object that comes closer or moves away along `path` (z); a cylinder lies on its side and rolls."""
    pose = _upright(scene, 0, x, 0.0, path, times)
    if not scene.rolls:
        return pose
    size, shape = sizes(scene)[0], scene.solids[0].shape
    if shape == "sphere":
        return _rolled(pose, path, 2, size)
    radius = HALF["cylinder"][0] * size
    centre = pose.centre.copy()
    centre[:, 1] = radius
    return _rolled(Pose(centre, turn(2, np.full(len(times), math.pi / 2))), path, 2, radius)


def poses(scene: Scene, times: Array) -> list[Pose]:
    """Every object's pose at `times` [T], the main one's first."""
    rest = [_upright(scene, i, x, 0.0, z, times) for i, (x, z) in enumerate(_spots(scene)) if i < len(scene.solids)]
    if scene.motion != "hit":
        return [_main(scene, times), *rest[1:]]
    pair = []
    for index, path in enumerate(_hit(scene, times)):
        pose = _upright(scene, index, path, 0.0, _spots(scene)[index][1], times)
        ball = scene.solids[index].shape == "sphere"
        pair.append(_rolled(pose, path, 0, sizes(scene)[index]) if ball else pose)
    return [*pair, *rest[2:]]


def view(scene: Scene, times: Array) -> View:
    """The camera at `times` [T]: it looks at a point over the middle of the floor."""
    swing = {"orbits left": -1.0, "orbits right": 1.0}.get(scene.camera or "", 0.0)
    track = {"moves in": -1.0, "moves out": 1.0}.get(scene.camera or "", 0.0)
    middle = 2 * times - 1
    azimuth = 0.06 * (scene.open[14] - 0.5) + 0.42 * swing * middle
    height = np.full(len(times), 0.2 + 0.03 * (scene.open[15] - 0.5))
    distance = 6.1 + 0.2 * (scene.open[16] - 0.5) + 1.1 * track * middle
    back = np.stack([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)], 1)
    position = np.array([0.0, 0.95, 0.0]) + distance[:, None] * back
    right = np.stack([np.cos(azimuth), np.zeros(len(times)), -np.sin(azimuth)], 1)
    return View(position, np.stack([right, np.cross(back, right), -back], 1))
