"""The demo model: what the words mean, what the pipeline takes, and that the packaged weights obey a caption."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH, tokenize
from rectified_spaattn.lab.demo_model.pipeline import WEIGHTS, DemoVideoPipeline, load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from studies.demo_model.network import build_caption_encoder, build_transformer


def centroid(mask: torch.Tensor) -> torch.Tensor:
    """Centroid (x, y) of each frame in pixels, [T, 2]."""
    y, x = torch.meshgrid(torch.arange(mask.shape[1]), torch.arange(mask.shape[2]), indexing="ij")
    return torch.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], 1)


@pytest.fixture(scope="module")
def pipe() -> DemoVideoPipeline:
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.slow  # of the weights, which change with a training alone
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
