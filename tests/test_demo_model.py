"""The demo model: what is drawn, what the words mean, and that the packaged weights do what their log says."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from rectified_spaattn.demo.data import VOCABULARY, Scene, Shape, render, sample_batch, sample_scene
from rectified_spaattn.demo.model import CAPTION_LENGTH, build_caption_encoder, build_transformer, tokenize
from rectified_spaattn.demo.pipeline import WEIGHTS, DemoVideoPipeline, load_demo_pipeline
from rectified_spaattn.demo.prompts import PROMPTS
from rectified_spaattn.demo.train import Run, build_model, held_out_loss
from rectified_spaattn.demo.training_config import TrainingConfig

SHAPE = Shape("white", "solid", "circle", "standing still", size="small", place="center")
SETTINGS = Path(__file__).parents[1] / "src" / "rectified_spaattn" / "demo" / "train.yaml"


def coverage(shape: Shape) -> torch.Tensor:
    """Where a white shape is, [T, H, W], drawn over black."""
    return (render([Scene((shape,), "black", "shaded")], 16, 64, 64)[0].mean(0) > 0.3).float()


def centroid(mask: torch.Tensor) -> torch.Tensor:
    """Centroid (x, y) of each frame in pixels, [T, 2]."""
    y, x = torch.meshgrid(torch.arange(mask.shape[1]), torch.arange(mask.shape[2]), indexing="ij")
    return torch.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], 1)


@pytest.fixture(scope="module")
def pipe() -> DemoVideoPipeline:
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def test_tokenizer() -> None:
    ids, mask = tokenize(["a red solid circle", "", "A Red, solid circle."])
    assert ids.shape == mask.shape == (3, CAPTION_LENGTH)
    assert mask.sum(1).tolist() == [5, 1, 5]
    assert mask[0, :5].all()
    assert torch.equal(ids[0], ids[2])
    with pytest.raises(ValueError, match=r"'elephant', 'grey'.*Use these words only: a, an.*zooms"):
        tokenize("a grey elephant")
    with pytest.raises(ValueError, match="at most 31 words, got 32"):
        tokenize(" ".join(["red"] * 32))
    with pytest.raises(TypeError, match="non-empty list of strings"):
        tokenize([])


def test_padding_never_reaches_the_video(pipe: DemoVideoPipeline) -> None:
    text = pipe.encode_prompt(PROMPTS[0], torch.device("cpu"))
    length = int(text["encoder_attention_mask"].sum())
    short = text | {key: text[key][:, :length] for key in ("encoder_hidden_states", "encoder_attention_mask")}
    latents = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        padded, trimmed = (pipe._velocity(latents, torch.tensor(700.0), t, "cond") for t in (text, short))
    torch.testing.assert_close(padded, trimmed, atol=1e-4, rtol=1e-4)


def test_pipeline_is_deterministic_by_generator(pipe: DemoVideoPipeline) -> None:
    def make(seed: int, **options: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(PROMPTS[0], 16, 24, 4, num_inference_steps=2, generator=generator, **options).frames

    frames = make(0)
    assert frames.shape == (1, 4, 3, 16, 24)
    assert 0 <= frames.min() < frames.max() <= 1
    assert torch.equal(frames, make(0))
    assert not torch.equal(frames, make(1))
    assert not torch.equal(frames, make(0, guidance_scale=3.0))
    noise = torch.randn(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frames, make(1, latents=noise))
    as_array = make(0, output_type="np")
    assert as_array.shape == (1, 4, 16, 24, 3)
    assert torch.equal(torch.from_numpy(as_array).permute(0, 1, 4, 2, 3), frames)


def test_pipeline_callback_replaces_latents(pipe: DemoVideoPipeline) -> None:
    seen: list[int] = []

    def callback(_: object, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        seen.append(step)
        return {"latents": torch.ones_like(tensors["latents"])}

    (frames,) = pipe(["", ""], 8, 8, 2, 3, callback_on_step_end=callback, return_dict=False)
    assert seen == [0, 1, 2]
    assert torch.equal(frames, torch.ones(2, 2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "height must be a positive multiple of 4, got 30"),
        ({"width": 0}, "width must be a positive multiple of 4, got 0"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"output_type": "pil"}, "output_type"),
        ({"latents": torch.zeros(1, 3, 4, 8, 8)}, "latents must have shape"),
    ],
)
def test_pipeline_rejects(pipe: DemoVideoPipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **options)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no demo weights in"):
        load_demo_pipeline(weights=tmp_path)


def test_packaged_weights_are_small() -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) <= 16_000_000


def test_packaged_weights_reach_the_logged_held_out_loss(pipe: DemoVideoPipeline) -> None:
    with (WEIGHTS / "loss.csv").open(newline="") as file:
        logged = float(list(csv.DictReader(file))[-1]["held_out"])
    model = torch.nn.ModuleDict({"transformer": pipe.transformer, "caption_encoder": pipe.caption_encoder})
    loss = held_out_loss(model, pipe.scheduler.config.shift)
    assert loss == pytest.approx(logged, rel=0.03)
    assert held_out_loss(build_model(), 3.0, count=4, size=(4, 32, 32)) > 20 * logged


def test_generated_shapes_obey_the_caption(pipe: DemoVideoPipeline) -> None:
    prompts = [f"a large red solid circle moving {way} over a blue shaded background" for way in ("left", "right")]
    frames = pipe(prompts, num_inference_steps=6, generator=torch.Generator().manual_seed(3)).frames
    red = (frames[:, :, 0] > frames[:, :, 2] + 0.1).float()
    assert (red[:, 4:12].mean((1, 2, 3)) > 0.03).all()
    blue = frames[:, :, 2] > frames[:, :, 0]
    assert (blue.float().mean((1, 2, 3)) > 0.5).all()
    left, right = (path[12] - path[4] for path in (centroid(red[0])[:, 0], centroid(red[1])[:, 0]))
    assert left < -6
    assert right > 6


def test_model_classes() -> None:
    transformer = build_transformer()
    parts = sum(p.numel() for model in (transformer, build_caption_encoder()) for p in model.parameters())
    assert parts < 8_000_000
    assert transformer.config.rope_axes_dim == (16, 24, 24)
    assert len(transformer.transformer_blocks) == 2
    assert len(transformer.single_transformer_blocks) == 4


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
