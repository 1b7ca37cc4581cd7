"""Scenes of the demo model: words, motion, and pictures against one ray at a time in float64."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from rectified_spaattn.lab.demo_model.model import VOCABULARY
from rectified_spaattn.lab.demo_model.words import PLACES
from slow_rays import Rays, outside
from studies.demo_model.motion import HALF, contact, poses, sizes, view
from studies.demo_model.render import NOWHERE, bodies_of, camera_rays, colours, nearest, render, render_numbers
from studies.demo_model.table import Numbers, numbers_of
from studies.demo_model.world import (
    CAMERAS,
    COLOURS,
    FLOORS,
    MATERIALS,
    MOTIONS,
    SHAPES,
    Scene,
    Solid,
    sample_scene,
)

TIMES = np.linspace(0, 1, 16)
BALL = Scene((Solid("red", "matte", "sphere"),), "still", None, "grey")
PAIR = (Solid("red", "matte", "sphere"), Solid("blue", "matte", "cube"))


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def double(numbers: Numbers) -> Numbers:
    return Numbers(*(getattr(numbers, field.name).double() for field in fields(numbers)))


def mask(scene: Scene, frame: int = 8) -> torch.Tensor:
    """Where the nearest thing is a solid, [128, 128]: the rays of a picture of 64 x 64."""
    numbers = numbers_of([scene], [frame])
    origin, direction = camera_rays(numbers, 128, 128)
    hit = nearest(bodies_of(numbers), origin, direction).entry[0, 0, 0]
    below = -origin[1] / direction[1].clamp_max(-1e-4)
    return (hit < below[0, 0, 0]) & (hit < NOWHERE)


def read_back(caption: str) -> dict[str, object]:
    """A scene's words from its caption."""
    solid = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(MATERIALS)}) ({'|'.join(SHAPES)})"
    main, floor, *camera = caption.split(", ")
    solids = tuple(Solid(*words) for words in re.findall(solid, main))
    rest = re.sub(solid, "{}", main).removesuffix(" and {}").removeprefix("{} ")
    place = next((place for place in PLACES if rest.endswith(f" {place} {{}}")), None)
    verb = rest.removesuffix(f" {place} {{}}") if place else rest
    verb = re.sub("rolls|slides", "{go}", verb).replace("{}", "{other}")
    return {
        "solids": solids,
        "motion": {text: name for name, text in MOTIONS.items()}[verb],
        "place": place,
        "floor": floor.split()[0],
        "sunset": floor.endswith("at sunset"),
        "camera": camera[0].removeprefix("camera ") if camera else None,
    }


def test_scenes_are_deterministic() -> None:
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)
    videos = render(scenes(2), 3, 16, 24)
    assert videos.shape == (2, 3, 3, 16, 24)
    assert videos.dtype == torch.float32
    assert torch.equal(videos, render(scenes(2), 3, 16, 24))


def test_captions_say_what_the_scene_is() -> None:
    drawn = scenes(600)
    for scene in drawn:
        words = read_back(scene.caption())
        assert words == {name: getattr(scene, name) for name in words}
        assert len(scene.caption().split()) <= 31
    words = {word.strip(",") for scene in drawn for word in scene.caption().split()}
    assert words == set(VOCABULARY)


def test_every_word_is_drawn_often() -> None:
    drawn = scenes(3000)
    for name, values in (("motion", MOTIONS), ("floor", FLOORS)):
        counts = [sum(getattr(scene, name) == value for scene in drawn) for value in values]
        assert min(counts) > 0.8 * len(drawn) / len(values)
    for camera in CAMERAS:
        assert sum(scene.camera == camera for scene in drawn) > 250


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_sinks_and_nothing_overlaps(shape: str) -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.1, 1.1, (4000, 3))
    points = points[outside(shape, points) < 0]
    for scene in scenes(150):
        scene = replace(scene, solids=(replace(scene.solids[0], shape=shape), *scene.solids[1:]))
        everything = poses(scene, TIMES)
        corners = points @ everything[0].rotation.transpose(0, 2, 1) * sizes(scene)[0]
        assert (corners[..., 1].min(1) + everything[0].centre[:, 1] > -1e-6).all(), scene.caption()
        radii = [
            size * HALF[solid.shape][0] * (2**0.5 if solid.shape == "cube" else 1)
            for solid, size in zip(scene.solids, sizes(scene), strict=True)
        ]
        lying = scene.motion in ("closer", "away") and shape == "cylinder"
        radii[0] = sizes(scene)[0] * 1.2 if lying else radii[0]
        for i in range(len(everything)):
            for j in range(i):
                if scene.motion == "hit" and i == 1:
                    continue
                apart = everything[i].centre - everything[j].centre
                assert (np.hypot(apart[:, 0], apart[:, 2]) > radii[i] + radii[j]).all(), (i, j, scene.caption())


@pytest.mark.parametrize("open_", [0.1, 0.9])
def test_a_hit_pushes_without_overlap(open_: float) -> None:
    scene = Scene(PAIR, "hit", None, "grey", open=(open_,) * 24)
    first, second = (pose.centre[:, 0] for pose in poses(scene, TIMES))
    gap = np.abs(second - first)
    assert (gap >= contact(scene) - 1e-9).all()
    assert gap.min() < contact(scene) + 0.25
    assert np.ptp(second[:6]) == 0
    assert abs(second[-1] - second[0]) > 0.5
    assert np.sign(second[-1] - second[0]) == np.sign(first[5] - first[0])


@pytest.mark.parametrize(("motion", "axis"), [("left", 0), ("right", 0), ("closer", 2), ("away", 2)])
def test_balls_roll_without_slipping(motion: str, axis: int) -> None:
    scene = replace(BALL, motion=motion)
    (pose,) = poses(scene, TIMES)
    step = np.diff(pose.centre[:, axis])
    assert (np.sign(step) == (1 if motion in ("right", "closer") else -1)).all()
    turn = pose.rotation[1:] @ pose.rotation[:-1].transpose(0, 2, 1)
    angle = np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1))
    np.testing.assert_allclose(angle * sizes(scene)[0], np.abs(step), rtol=1e-6)
    top = turn @ np.array([0.0, 1, 0])
    assert (np.sign(top[:, axis]) == np.sign(step)).all(), "the top of a rolling ball moves ahead"


def test_bounces_and_drops_reach_the_floor_and_come_up_again() -> None:
    for motion, contacts in (("bounce", 3), ("drop", 1)):
        (pose,) = poses(replace(BALL, motion=motion), np.linspace(0, 1, 2000))
        height = pose.centre[:, 1] - sizes(BALL)[0]
        low = height < 0.01
        assert height.min() >= 0
        assert np.count_nonzero(np.diff(low.astype(int)) == 1) >= contacts
        assert height[-200:].max() < height[:200].max()


def test_cameras_move_as_they_say() -> None:
    left, right, near, far = (view(replace(BALL, camera=camera), TIMES).position for camera in CAMERAS)
    assert (np.diff(left[:, 0]) < 0).all()
    assert (np.diff(right[:, 0]) > 0).all()
    assert (np.diff(near[:, 2]) < 0).all()
    assert (np.diff(far[:, 2]) > 0).all()
    axes = view(replace(BALL, camera="orbits left"), TIMES).axes
    np.testing.assert_allclose(axes @ axes.transpose(0, 2, 1), np.broadcast_to(np.eye(3), axes.shape), atol=1e-12)


@pytest.mark.parametrize("motion", ["left", "enter left", "leave left", "right", "enter right", "leave right"])
def test_objects_on_the_screen_go_where_the_caption_says(motion: str) -> None:
    scene = replace(BALL, motion=motion)
    columns = torch.arange(128.0)
    path = [float((m.float() * columns).sum() / m.sum()) for m in (mask(scene, f) for f in (5, 7, 9)) if m.any()]
    to_right = motion in ("right", "enter left", "leave right")
    assert len(path) == 3
    assert all((after - before > 2) == to_right for before, after in itertools.pairwise(path))
    assert mask(scene, 0).any() == (not motion.startswith("enter"))
    assert mask(scene, 15).any() == (not motion.startswith("leave"))


def test_closer_grows_and_away_shrinks() -> None:
    areas = {
        motion: [int(mask(replace(BALL, motion=motion), f).sum()) for f in (0, 15)] for motion in ("closer", "away")
    }
    assert areas["closer"][1] > 2 * areas["closer"][0]
    assert areas["away"][0] > 2 * areas["away"][1]


@pytest.mark.parametrize("colour", COLOURS)
def test_object_pixels_have_the_objects_hue(colour: str) -> None:
    scene = replace(BALL, solids=(Solid(colour, "matte", "cube"),))
    picture = render_numbers(numbers_of([scene], [8]))[0, :, 0] / 2 + 0.5
    whole = torch.nn.functional.avg_pool2d(mask(scene)[None].float(), 2)[0] == 1
    seen = picture[:, whole].mean(1)
    names = list(COLOURS)
    table = torch.tensor([COLOURS[name] for name in names])
    likeness = torch.nn.functional.cosine_similarity(table, seen[None])
    assert names[int(likeness.argmax())] == colour


def test_shadows_darken_the_floor_only() -> None:
    with_ball = render_numbers(numbers_of([BALL], [8]))[0, :, 0]
    numbers = numbers_of([BALL], [8])
    numbers.poses[..., 1] = -99
    away = render_numbers(numbers)[0, :, 0]
    free = torch.nn.functional.max_pool2d(mask(BALL)[None].float(), 2)[0] == 0
    change = ((with_ball + 1) / (away + 1)).mean(0)[free]
    assert change.max() < 1.001
    assert (change < 0.75).sum() > 40
    assert (change > 0.98).float().mean() > 0.5


def test_the_nearer_solid_hides_the_other() -> None:
    front = Scene(PAIR, "still", "in front of", "grey")
    numbers = numbers_of([front], [8])
    rays = camera_rays(numbers, 64, 64)
    both = nearest(bodies_of(numbers), *rays).entry
    alone = []
    for k in range(2):
        moved = numbers.poses.clone()
        moved[:, :, 1 - k, 1] = -99
        alone.append(nearest(bodies_of(replace(numbers, poses=moved)), *rays).entry)
    assert torch.equal(both, torch.minimum(*alone))
    covered = (alone[0] < NOWHERE) & (alone[1] < NOWHERE)
    assert covered.any()
    assert (alone[0] < alone[1])[covered].all()


@pytest.mark.parametrize("seed", range(6))
def test_pictures_equal_one_ray_at_a_time(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    materials = rng.sample(MATERIALS, 3)
    solids = tuple(replace(solid, material=m) for solid, m in zip(scene.solids, materials, strict=False))
    scene, frame = replace(scene, solids=solids), 7
    numbers = double(numbers_of([scene], [frame]))
    origin, direction = camera_rays(numbers, 40, 40)
    solid = torch.nonzero(mask_at(numbers, origin, direction).flatten()).flatten().tolist()
    chosen = torch.tensor(rng.sample(solid, min(24, len(solid))) + rng.sample(range(1600), 12))
    picked = tuple(part.flatten()[chosen][None, None, None, None] for part in direction)
    seen = torch.cat(colours(numbers, origin, picked))[:, 0, 0, 0].T.numpy()
    slow = Rays(scene, frame / 15)
    eye = np.array([float(part) for part in origin])
    directions = torch.stack([part.flatten() for part in picked], 1).numpy()
    wanted = np.stack([slow.colour(eye, direction) for direction in directions])
    error = np.abs(seen - wanted).max(1)
    assert (error > 2e-4).sum() <= 2, f"{scene.caption()}: {error}"  # rays that graze an edge between the slow steps


def mask_at(numbers: Numbers, origin: tuple, direction: tuple) -> torch.Tensor:
    return nearest(bodies_of(numbers), origin, direction).entry < NOWHERE


def test_pictures_are_finite_and_frames_stand_alone() -> None:
    drawn = scenes(12, seed=3)
    whole = render_numbers(numbers_of(drawn, range(0, 16, 5)), 32, 32)
    assert whole.isfinite().all()
    assert -1 <= whole.min() < -0.5
    assert 0.5 < whole.max() <= 1
    torch.testing.assert_close(whole[:, :, 2:3], render_numbers(numbers_of(drawn, [10]), 32, 32), atol=1e-3, rtol=0)


def test_render_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs a scene and sizes of at least 1"):
        render([])
