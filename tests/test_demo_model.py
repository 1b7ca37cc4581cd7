"""The demo model: what the words mean, what the pipeline takes, and that the packaged weights obey a caption."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH, PAD, PATCH_SIZE, VOCABULARY, tokenize
from rectified_spaattn.lab.demo_model.pipeline import WEIGHTS, DemoVideoPipeline, load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS


def centre(mask: torch.Tensor) -> torch.Tensor:
    """Mean column of the True pixels of every frame, [T], of bool [T, H, W]."""
    columns = torch.arange(mask.shape[2], dtype=torch.float32)
    return (mask * columns).sum((1, 2)) / mask.sum((1, 2))


@pytest.fixture(scope="module")
def pipe() -> DemoVideoPipeline:
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_tokenizer() -> None:
    ids = tokenize(["a red matte cube", "", "A Red, matte cube."])
    assert ids.shape == (3, CAPTION_LENGTH)
    assert (ids != PAD).sum(1).tolist() == [5, 1, 5]
    assert (ids[0, :5] != PAD).all()
    assert torch.equal(ids[0], ids[2])
    with pytest.raises(ValueError, match=r"'elephant', 'pink'.*Use these words only: a, above.*yellow"):
        tokenize("a pink elephant")
    with pytest.raises(ValueError, match="at most 31 words, got 32"):
        tokenize(" ".join(["red"] * 32))
    with pytest.raises(TypeError, match="non-empty list of strings"):
        tokenize([])


def test_every_word_of_a_caption_reaches_the_video(pipe: DemoVideoPipeline) -> None:
    latents = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def velocity(prompt: str) -> torch.Tensor:
        text = pipe.encode_prompt(prompt, torch.device("cpu"))
        assert text["encoder_attention_mask"].all()
        with torch.no_grad():
            return pipe._velocity(latents, torch.tensor(700.0), text, "cond")

    first = velocity("a red matte cube slides left, grey floor")
    for other in ("a blue matte cube slides left, grey floor", "a red matte cube slides left, sandy floor"):
        assert (velocity(other) - first).abs().max() > 1e-2


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
    assert sum(sizes) <= 24_000_000


@pytest.mark.slow  # of the weights, which change with a training alone
def test_generated_solids_obey_the_caption(pipe: DemoVideoPipeline) -> None:
    prompts = [f"a red matte cube slides {way}, grey floor" for way in ("left", "right")]
    frames = pipe(prompts, num_inference_steps=6, generator=torch.Generator().manual_seed(3)).frames
    red = frames[:, :, 0] > frames[:, :, 2] + 0.2
    assert (red[:, 4:12].float().mean((1, 2, 3)) > 0.02).all()
    left, right = (path[12] - path[4] for path in (centre(red[0]), centre(red[1])))
    assert left < -6
    assert right > 6


def test_packaged_model(pipe: DemoVideoPipeline) -> None:
    models = (pipe.transformer, pipe.caption_encoder)
    assert sum(p.numel() for model in models for p in model.parameters()) <= 12_000_000
    assert pipe.caption_encoder.config.vocabulary_size == len(VOCABULARY) + 2
    assert pipe.transformer.config.patch_size == PATCH_SIZE
