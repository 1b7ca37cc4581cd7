"""A scene as the numbers that the renderer reads: made on the CPU, a few kilobytes a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .motion import HALF, poses, sizes, view
from .world import COLOURS, Scene, Solid

MOST_SOLIDS = 3
ENDLESS = 1e3  # half extent of a slab that a shape hasn't

# One row a solid: quadric a (x² + z²) + c y² + d y + e <= 0, three half extents, size, two colours, and the material:
# weight of the second colour's stripes and checks, of reflection, of transmission and of the highlight.
SOLID_COLUMNS = 4 + 3 + 1 + 6 + 5
# Light direction 3, zenith 3, horizon 3, two floor colours 6, offset of the checks 2, light's strength 1
WORLD_COLUMNS = 18
_LOOKS: dict[str, tuple[float, ...]] = {  # stripes, checks, reflection, transmission, highlight
    "matte": (0.0, 0.0, 0.0, 0.0, 0.08),
    "metal": (0.0, 0.0, 0.62, 0.0, 0.9),
    "glass": (0.0, 0.0, 0.12, 0.8, 0.9),
    "striped": (1.0, 0.0, 0.0, 0.0, 0.25),
    "checkered": (0.0, 1.0, 0.0, 0.0, 0.25),
}
_FLOORS = {
    "grey": ((0.60, 0.61, 0.63),) * 2,
    "sandy": ((0.80, 0.66, 0.44),) * 2,
    "checkered": ((0.86, 0.86, 0.84), (0.34, 0.35, 0.38)),
}
_SKIES = {  # zenith, horizon, strength of the light
    False: ((0.25, 0.50, 0.90), (0.80, 0.90, 0.98), 1.0),
    True: ((0.36, 0.26, 0.52), (1.00, 0.66, 0.36), 0.92),
}


@dataclass(frozen=True)
class Numbers:
    """A batch of scenes: solids [B, 3, 19], poses [B, T, 3, 12], cameras [B, T, 12], worlds [B, 18], float32."""

    solids: Tensor
    poses: Tensor
    cameras: Tensor
    worlds: Tensor

    def to(self, device: str | torch.device) -> Numbers:
        return Numbers(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pinned(self) -> Numbers:
        return Numbers(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def _quadric(shape: str) -> tuple[float, ...]:
    """Quadric (a, c, d, e) and half extents of the three slabs whose common inside is the shape."""
    radius, height, _ = HALF[shape]
    if shape == "sphere":
        return (1.0, 1.0, 0.0, -1.0, ENDLESS, ENDLESS, ENDLESS)
    if shape == "cylinder":
        return (1.0, 0.0, 0.0, -(radius**2), ENDLESS, height, ENDLESS)
    if shape == "cone":
        slope = (radius / (2 * height)) ** 2
        return (1.0, -slope, 2 * slope * height, -slope * height**2, ENDLESS, height, ENDLESS)
    return (0.0, 0.0, 0.0, -1.0, radius, height, radius)


def _solid(solid: Solid, size: float) -> tuple[float, ...]:
    colour = COLOURS[solid.colour]
    other = (0.95, 0.95, 0.93) if solid.colour not in ("white", "yellow") else (0.16, 0.16, 0.20)
    return (*_quadric(solid.shape), size, *colour, *other, *_LOOKS[solid.material])


_NO_SOLID = (*_quadric("sphere"), 1e-3, *(0.0,) * 11)
_NO_POSE = (0.0, -99.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # under the floor


def _world(scene: Scene) -> tuple[float, ...]:
    azimuth = -0.85 + 0.4 * (scene.open[17] - 0.5)
    height = 0.95 if not scene.sunset else 0.62
    light = (math.sin(azimuth) * math.cos(height), math.sin(height), math.cos(azimuth) * math.cos(height))
    zenith, horizon, strength = _SKIES[scene.sunset]
    first, second = _FLOORS[scene.floor]
    return (*light, *zenith, *horizon, *first, *second, scene.open[18], scene.open[19], strength)


def numbers_of(scenes: Sequence[Scene], frames: Sequence[int], num_frames: int = 16) -> Numbers:
    """The numbers of `frames` (indices) of clips of `num_frames` frames, on the CPU."""
    times = np.asarray(frames) / max(1, num_frames - 1)
    solids = np.tile(np.array(_NO_SOLID, np.float32), (len(scenes), MOST_SOLIDS, 1))
    places = np.tile(np.array(_NO_POSE, np.float32), (len(scenes), len(frames), MOST_SOLIDS, 1))
    cameras = np.empty((len(scenes), len(frames), 12), np.float32)
    for b, scene in enumerate(scenes):
        for k, (solid, size, pose) in enumerate(zip(scene.solids, sizes(scene), poses(scene, times), strict=True)):
            solids[b, k] = _solid(solid, size)
            places[b, :, k, :3] = pose.centre
            places[b, :, k, 3:] = pose.rotation.reshape(len(times), 9)
        camera = view(scene, times)
        cameras[b, :, :3] = camera.position
        cameras[b, :, 3:] = camera.axes.reshape(len(times), 9)
    worlds = np.array([_world(scene) for scene in scenes], np.float32)
    return Numbers(*(torch.from_numpy(array) for array in (solids, places, cameras, worlds)))
