"""Training of the demo model at tiny sizes: batches, network, resuming, guidance, export, reading of clips."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoRotaryPosEmbed,
)

from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH, tokenize
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from studies.demo_model import checkpoint, export, feed, fit, recognise
from studies.demo_model.network import FrameRope, Network, forward_flops, generate
from studies.demo_model.recipe import Recipe, Stage
from studies.demo_model.render import render_numbers
from studies.demo_model.table import numbers_of
from studies.demo_model.world import CAMERAS, COLOURS, FLOORS, MATERIALS, SHAPES

TINY = Recipe(
    steps=8,
    frames=4,
    size=16,
    heads=1,
    single_blocks=1,
    refiner_blocks=1,
    sync_every=2,
    warmup_steps=2,
    workers=0,
    compile=False,
    stages=(Stage(until=0.5, frames=2, batch=3), Stage(until=1.0, frames=4, batch=2)),
)
FOREVER = 1e9
CPU = torch.device("cpu")


def changed(**settings: object) -> Recipe:
    return Recipe(**{**vars(TINY), **settings})


def random_network(recipe: Recipe = TINY) -> Network:
    """A network none of whose weights is zero."""
    torch.manual_seed(1)
    network = Network(recipe).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy = torch.randn(batch, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return noisy, torch.linspace(0.4, 0.9, batch), tokenize(["a red matte cube spins, grey floor", ""][:batch])


def test_batches_are_the_same_for_the_same_index() -> None:
    batches = feed.Batches(0, 0, 2, 4, 3, 0.1)
    one, two, other = batches[5], batches[5], batches[6]
    assert one.frames == two.frames
    assert torch.equal(one.numbers.poses, two.numbers.poses)
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.numbers.poses, other.numbers.poses)
    assert not torch.equal(one.numbers.poses, feed.Batches(0, 1, 2, 4, 3, 0.1)[5].numbers.poses)
    assert {batches[i].frames for i in range(12)} == {range(0, 4, 2), range(1, 4, 2)}
    assert (feed.Batches(0, 0, 4, 4, 40, 1.0)[0].ids[:, 1:] == 0).all(), "every caption is dropped"


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = numbers_of(feed.sample_scenes(0, 2), (1, 2, 3), 4)
    monkeypatch.setattr(feed, "CHUNK", 4)
    torch.testing.assert_close(feed.draw(numbers, 16), render_numbers(numbers, 16, 16))


def test_tokenizer_pads_and_names_what_it_does_not_know() -> None:
    ids = tokenize(["a red glass cone", "A Red, glass cone.", ""])
    assert ids.shape == (3, CAPTION_LENGTH)
    assert torch.equal(ids[0], ids[1])
    assert (ids != 0).sum(1).tolist() == [5, 5, 1]
    with pytest.raises(ValueError, match=r"'elephant'.*Use these words only: a, above, an"):
        tokenize("a red elephant")
    with pytest.raises(ValueError, match="at most 31 words, got 32"):
        tokenize(" ".join(["red"] * 32))


@torch.no_grad()
def test_the_network_is_the_stock_transformer() -> None:
    """Without a mask, and with the rotary embedding of chosen frames, it computes what the class computes."""
    network = random_network(changed(prediction="velocity"))
    noisy, sigmas, ids = inputs()
    stock = HunyuanVideoTransformer3DModel(**network.transformer.config).eval()
    stock.load_state_dict(network.transformer.state_dict())
    assert {type(p) for p in stock.attn_processors.values()} >= {HunyuanVideoAttnProcessor2_0}
    embeds, summary = network.caption_encoder(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = stock(noisy, sigmas * 1000, embeds, mask, summary, return_dict=False)[0]
    torch.testing.assert_close(network(noisy, sigmas, ids), expected, atol=1e-5, rtol=1e-5)


def test_some_frames_have_their_own_positions() -> None:
    stock = HunyuanVideoRotaryPosEmbed(4, 1, [16, 24, 24])
    rope = FrameRope(stock, 4)
    whole = stock(torch.empty(1, 3, 4, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(rope(torch.empty(1, 3, 4, 8, 8)), whole, strict=True))
    rope.frames = range(1, 4, 2)
    some = rope(torch.empty(1, 3, 2, 8, 8))
    for part, all_ in zip(some, whole, strict=True):
        assert torch.equal(part, torch.cat([all_[4:8], all_[12:16]]))


@torch.no_grad()
def test_a_clean_prediction_becomes_a_velocity() -> None:
    noisy, sigmas, ids = inputs()
    output = random_network(changed(prediction="velocity"))(noisy, sigmas, ids)
    velocity = random_network(changed(prediction="clean"))(noisy, sigmas, ids)
    level = sigmas.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - level * velocity, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_generation_follows_the_velocity_to_the_video(steps: int) -> None:
    video = torch.rand(2, 3, 4, 8, 8) * 2 - 1

    class Exact(torch.nn.Module):
        calls = 0

        def forward(self, noisy: torch.Tensor, sigmas: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return (noisy - video) / sigmas.view(-1, 1, 1, 1, 1)

    exact = Exact()
    noise = torch.randn(video.shape)
    made = generate(exact, ["", ""], noise, steps=steps, guidance=2.0, span=(0.5, 1.0))
    torch.testing.assert_close(made, video, atol=1e-5, rtol=1e-5)
    assert steps < exact.calls < 2 * steps or steps == 1


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path) -> None:
    first = fit.Run(TINY, CPU)
    first.train(FOREVER, steps=4)
    first.save(tmp_path)
    first.train(FOREVER, steps=4)
    second = fit.Run(TINY, CPU)
    second.resume(tmp_path)
    assert (second.step, second.samples) == (4, 12)
    second.train(FOREVER)
    assert first.step == second.step == 8
    assert first.samples == second.samples == 20
    for name in ("network", "average"):
        pairs = zip(weights(getattr(first, name)), weights(getattr(second, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [row["loss"] for row in first.rows] == [row["loss"] for row in second.rows]
    assert [row["frames"] for row in first.rows] == [2, 4]


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_the_average() -> None:
    run = fit.Run(changed(steps=30, prediction="velocity", stages=(Stage(until=1.0, frames=4, batch=4),)), CPU)
    before, loss = weights(run.average), fit.held_out_loss(run.average, TINY, CPU, 4, count=4)
    run.train(FOREVER)
    assert fit.held_out_loss(run.average, TINY, CPU, 4, count=4) < 0.9 * loss
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(run.average), strict=True))


@torch.no_grad()
def test_guidance_is_learned_from_the_run_it_starts_from(tmp_path: Path) -> None:
    origin = fit.Run(TINY, CPU)
    origin.average = random_network()
    origin.save(tmp_path)
    run = fit.Run(changed(guidance=3.0), CPU)
    run.start_from(tmp_path)
    assert run.step == 0
    noisy, sigmas, _ = inputs()
    ids = tokenize(["a red matte cube spins, grey floor", "a blue glass cone stands still, grey floor"])
    batch = feed.Batch(range(4), numbers_of(feed.sample_scenes(0, 2), range(4), 4), ids)
    told, free = run.network(noisy, sigmas, ids), run.network(noisy, sigmas, tokenize(["", ""]))
    assert (told - free).abs().max() > 1e-3
    target = run.target(noisy, sigmas, batch, torch.zeros_like(noisy))
    torch.testing.assert_close(target, told + 2 * (told - free), atol=1e-5, rtol=1e-4)
    assert fit.Run(TINY, CPU).target(noisy, sigmas, batch, noisy) is noisy


def test_noise_levels_are_logit_normal() -> None:
    levels = fit.noise_levels(changed(level_mean=0.8, level_spread=1.0), 4000, torch.Generator().manual_seed(0))
    logits = torch.logit(levels)
    assert logits.mean() == pytest.approx(0.8, abs=0.01)
    assert logits.std() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_has_one_optimizer(optimizer: str) -> None:
    network = Network(TINY)
    groups = [
        group for each in fit.build_optimizers(network, changed(optimizer=optimizer)) for group in each.param_groups
    ]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in network.parameters())
    assert len(groups) == (2 if optimizer == "muon" else 1)


def test_learning_rate_warms_up_at_every_start_and_falls_at_the_end() -> None:
    recipe = changed(warmup_steps=4, decay_share=0.5)
    assert [recipe.lr_factor(step, 0.1) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert recipe.lr_factor(9, 0.75) == 0.5
    assert recipe.lr_factor(9, 1.0) == 0.0


def test_recipes_are_read_strictly(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(fit.RECIPE, {"heads": 2})
    assert recipe.heads == 2
    assert recipe.stage(0.1).frames == 4
    assert recipe.stage(1.0).frames == 16
    with pytest.raises(ValueError, match="unknown training settings speed; known are seed"):
        Recipe.from_dict({"speed": 1})
    with pytest.raises(ValueError, match="prediction must be one of velocity, clean"):
        changed(prediction="noise")
    with pytest.raises(ValueError, match=r"stages must end in order, the last at 1.0"):
        changed(stages=(Stage(until=0.5, frames=4, batch=1),))
    with pytest.raises(TypeError, match="lr must be float"):
        changed(lr="fast")
    with pytest.raises(RuntimeError, match="no run in"):
        checkpoint.load(tmp_path, {})


def test_checkpoints_are_split_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 100_000)
    network, copy = random_network().half().float(), Network(TINY)
    checkpoint.save(tmp_path, {"average": network}, {"step": 3})
    assert len(list(tmp_path.glob("weights-*.safetensors"))) > 3
    assert checkpoint.load(tmp_path, {"average": copy}) == {"step": 3}
    assert all(torch.equal(a, b) for a, b in zip(weights(network), weights(copy), strict=True))


def test_the_model_fits_the_package_and_the_cpu() -> None:
    recipe = Recipe.from_yaml(fit.RECIPE)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Network(recipe).parameters())
    assert count <= 12e6
    assert forward_flops(recipe, 16) < 1.25e11


@torch.no_grad()
def test_export_is_what_diffusers_reads(tmp_path: Path) -> None:
    network = random_network(changed(prediction="velocity")).half().float()
    recipe = vars(TINY) | {"prediction": "velocity", "stages": [vars(TINY.stages[1])]}
    checkpoint.save(tmp_path / "run", {"average": network}, {"recipe": recipe})
    export.main(tmp_path / "run", tmp_path / "out", 3.0)
    stock = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer", torch_dtype=torch.float32)
    noisy, sigmas, ids = inputs()
    embeds, summary = network.caption_encoder(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    made = stock(noisy, sigmas * 1000, embeds, mask, summary, return_dict=False)[0]
    torch.testing.assert_close(made, network(noisy, sigmas, ids), atol=1e-5, rtol=1e-5)
    checkpoint.save(tmp_path / "clean", {"average": network}, {"recipe": recipe | {"prediction": "clean"}})
    with pytest.raises(RuntimeError, match="takes velocities alone"):
        export.main(tmp_path / "clean", tmp_path / "out", 3.0)


@pytest.mark.slow
def test_a_call_trains_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        f"{name}={getattr(TINY, name)}" for name in ("steps", "frames", "size", "heads", "single_blocks", "sync_every")
    ]
    settings = [*tiny, "workers=0", "compile=false", "stages=[{until: 1.0, frames: 4, batch: 2}]"]
    fit.main(tmp_path, fit.RECIPE, settings, None, None, 9.0, 2)
    fit.main(tmp_path, fit.RECIPE, settings, tmp_path, None, 9.0, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" minutes")[0] for line in lines if line.startswith("step")] == [
        "step 2 samples 4",
        "step 4 samples 8",
    ]


def test_fixed_captions_are_of_the_grammar() -> None:
    drawn = {phrase(scene.caption()) for scene in feed.sample_scenes(0, 4000)}
    assert {phrase(caption) for caption in PROMPTS} <= drawn


def phrase(caption: str) -> str:
    """A caption's order of words, without the colours, materials, shapes, floor and camera it names."""
    for names in (COLOURS, MATERIALS, SHAPES, FLOORS, CAMERAS):
        caption = re.sub("|".join(names), "_", caption)
    return caption.replace("an _", "a _").replace(" at sunset", "").replace(", camera _", "")


def test_readers_are_scored_by_attribute() -> None:
    scenes = feed.sample_scenes(0, 5)
    wanted = recognise.labels(scenes)
    assert list(wanted) == list(recognise.ATTRIBUTES)
    logits = recognise.Reader(8)(torch.zeros(2, 3, 16, 64, 64))
    assert {name: value.shape for name, value in logits.items()} == {
        name: (2, len(values)) for name, values in recognise.ATTRIBUTES.items()
    }

    class Perfect(torch.nn.Module):
        def forward(self, videos: torch.Tensor) -> dict[str, torch.Tensor]:
            hot = {name: torch.nn.functional.one_hot(wanted[name], len(v)) for name, v in recognise.ATTRIBUTES.items()}
            return {**hot, "shape": -hot["shape"]}

    shares = recognise.accuracy(Perfect(), torch.zeros(5, 3, 16, 64, 64), scenes)
    assert shares["colour"] == shares["motion"] == 1
    assert shares["shape"] == 0
