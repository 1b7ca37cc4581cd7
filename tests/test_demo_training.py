"""Training of the demo model: what is drawn, that a run can be resumed, and that the packaged weights do what their log
says."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH, VOCABULARY, tokenize
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from studies.demo_model.config import TrainingConfig
from studies.demo_model.scenes import Scene, Shape, render, sample_batch, sample_scene
from studies.demo_model.train import SETTINGS, Run, build_model, held_out_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = Shape("white", "solid", "circle", "standing still", size="small", place="center")


def coverage(shape: Shape) -> torch.Tensor:
    """Where a white shape is, [T, H, W], drawn over black."""
    return (render([Scene((shape,), "black", "shaded")], 16, 64, 64)[0].mean(0) > 0.3).float()


def centroid(mask: torch.Tensor) -> torch.Tensor:
    """Centroid (x, y) of each frame in pixels, [T, 2]."""
    y, x = torch.meshgrid(torch.arange(mask.shape[1]), torch.arange(mask.shape[2]), indexing="ij")
    return torch.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], 1)


def test_batches_are_deterministic_and_in_range() -> None:
    videos, captions = sample_batch(5, 4, 6, 20, 28)
    again, same_captions = sample_batch(5, 4, 6, 20, 28)
    other, other_captions = sample_batch(6, 4, 6, 20, 28)
    assert videos.shape == (4, 3, 6, 20, 28)
    assert videos.dtype == torch.float32
    assert -1 <= videos.min() < -0.3
    assert 0.3 < videos.max() <= 1
    assert torch.equal(videos, again)
    assert captions == same_captions
    assert captions != other_captions
    assert not torch.equal(videos, other)


def test_captions_are_in_the_vocabulary_and_of_many_lengths() -> None:
    rng = random.Random(0)
    captions = [sample_scene(rng).caption() for _ in range(500)] + list(PROMPTS)
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert words == set(VOCABULARY)
    lengths = tokenize(captions)[1].sum(1)
    assert lengths.max() <= CAPTION_LENGTH
    assert len(set(lengths.tolist())) > 8


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)],
)
def test_a_moving_shape_moves_that_way(motion: str, axis: int, sign: int) -> None:
    path = centroid(coverage(replace(SHAPE, motion=motion)))
    assert (sign * path[:, axis].diff() > 0.5).all()
    assert path[:, 1 - axis].diff().abs().max() < 0.1


def test_growing_spinning_and_standing_still() -> None:
    larger = coverage(replace(SHAPE, motion="growing larger")).sum((1, 2))
    smaller = coverage(replace(SHAPE, motion="growing smaller")).sum((1, 2))
    assert larger[-1] > 3 * larger[0]
    assert smaller[0] > 3 * smaller[-1]
    still = render([Scene((SHAPE,), "black", "dotted")], 4, 32, 32)[0]
    assert torch.equal(still[:, 0], still[:, 3])
    moon = replace(SHAPE, shape="crescent", size="large")
    for motion, sign in (("spinning clockwise", 1), ("spinning counterclockwise", -1)):
        arm = centroid(coverage(replace(moon, motion=motion))) - 31.5
        turn = arm[:-1, 0] * arm[1:, 1] - arm[:-1, 1] * arm[1:, 0]  # y grows downwards: positive is clockwise
        assert (sign * turn > 0).all()


def test_sizes_places_and_camera() -> None:
    assert coverage(replace(SHAPE, size="large")).sum() > 2.5 * coverage(SHAPE).sum()
    x, y = centroid(coverage(replace(SHAPE, place="left")))[0]
    assert x < 22
    assert 26 < y < 38
    top = render([Scene((SHAPE,), "blue", "dotted", camera="pans left")], 16, 64, 64)[0, :, :2, :12]
    first, second = top[:, 0], top[:, 1]
    right = (second[..., 2:] - first[..., :-2]).abs().mean()
    left = (second[..., :-2] - first[..., 2:]).abs().mean()
    assert right < 0.5 * left, "a camera that pans left sees the background move right"


def test_render_rejects_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="one or two shapes"):
        render([Scene((), "blue", "dotted")], 4, 16, 16)
    with pytest.raises(ValueError, match="at least 1"):
        render([Scene((SHAPE,), "blue", "dotted")], 0, 16, 16)


@pytest.mark.slow
def test_packaged_weights_reach_the_logged_held_out_loss() -> None:
    pipe = load_demo_pipeline()
    with SETTINGS.with_name("loss.csv").open(newline="") as file:
        logged = float(list(csv.DictReader(file))[-1]["held_out"])
    model = torch.nn.ModuleDict({"transformer": pipe.transformer, "caption_encoder": pipe.caption_encoder})
    loss = held_out_loss(model, pipe.scheduler.config.shift)
    assert loss == pytest.approx(logged, rel=0.03)
    assert held_out_loss(build_model(), 3.0, count=4, size=(4, 32, 32)) > 20 * logged


def test_training_settings_are_strict() -> None:
    settings = TrainingConfig.from_yaml(SETTINGS)
    assert settings == TrainingConfig()
    with pytest.raises(ValueError, match="unknown training settings larning_rate; known are seed"):
        TrainingConfig.from_dict({"larning_rate": 1})
    with pytest.raises(ValueError, match="large_steps must be between 0 and 1, got 3"):
        TrainingConfig(large_steps=3)
    with pytest.raises(TypeError, match="compile must be bool, got 1"):
        TrainingConfig(compile=1)  # type: ignore[arg-type]
    assert settings.lr_factor(0, 0.0) == 1 / settings.warmup_steps
    assert settings.lr_factor(10_000, 0.3) == 1.0
    assert settings.lr_factor(10_000, 1.0) == 0.0


def test_training_resumes(tmp_path: Path) -> None:
    config = replace(TrainingConfig().for_cpu(), frames=2, small=16, large=24, small_batch=2, large_batch=2)
    first = Run(config, tmp_path, torch.device("cpu"))
    first.train(600, max_steps=2)
    second = Run(config, tmp_path, torch.device("cpu"))
    second.resume()
    assert (second.step, second.samples) == (2, 4)
    for saved, loaded in zip(first.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(saved, loaded)
    second.train(600, max_steps=1)
    assert [row["step"] for row in second.rows] == [2, 3]
    frames = load_demo_pipeline(weights=tmp_path / "weights")(PROMPTS[0], 16, 16, 2, 1).frames
    assert frames.isfinite().all()
    with pytest.raises(RuntimeError, match="nothing to resume"):
        Run(config, tmp_path / "elsewhere", torch.device("cpu")).resume()
