"""What an evaluation is given: prompts with pictures of their own, presets by name, few steps, another scheduler."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from PIL import Image

import tiny
import tiny_models
from clip_runs import command, evaluate, generate, rows
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.clips.evaluate import evaluation_of
from rectified_spaattn.lab.clips.models import Source, _change_scheduler, call_arguments, source_of
from rectified_spaattn.lab.clips.options import ClipError, EvaluateOptions
from rectified_spaattn.lab.clips.prompts import read_prompts
from rectified_spaattn.lab.machine import device_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--height", 64, "--width", 64, "--frames", 5, "--steps", 1, "--dtype", "float32", "--device", "cpu"]
SMALL += ["--argument", "max_sequence_length=12"]


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline that starts from a picture and may end with another, three of them, and a table of prompts."""
    folder = tmp_path_factory.mktemp("i2v")
    parts = tiny.wan_pipeline().components | {"transformer": tiny_models.wan(16, in_channels=36).eval()}
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    diffusers.WanImageToVideoPipeline(**{name: parts[name] for name in names}).save_pretrained(folder / "wan-i2v")
    for name, kind in (("up", "L"), ("round", "L")):
        picture = Image.linear_gradient(kind) if name == "up" else Image.radial_gradient(kind)
        picture.convert("RGB").resize((64, 64)).save(folder / f"{name}.png")
    (folder / "rows.csv").write_text("prompt,image,last_image\na b,up.png,round.png\n\nc d,round.png,up.png\n")
    return folder


def test_every_row_of_a_table_has_pictures_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,image\n"a fox, red",first.png\nan owl,https://x.org/o.png\n', encoding="utf-8")
    assert read_prompts(path) == {
        "a fox, red": {"image": str(tmp_path / "first.png")},
        "an owl": {"image": "https://x.org/o.png"},
    }
    text = tmp_path / "lines.txt"
    text.write_text("a fox, red\n\n an owl \n")
    assert read_prompts(text) == {"a fox, red": {}, "an owl": {}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image\nx.png\n", "got the columns"),
        ("prompt,picture\na,x.png\n", "got the columns"),
        ("prompt,image\na,\n", "row 2: got an empty cell"),
        ("prompt,image\na,x.png\na,y.png\n", "'a' more than once"),
        ("prompt,image\n", "no line with text"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / "rows.csv")


PIPELINES = {  # that start from an image -> whether they can end with another
    "WanImageToVideoPipeline": True,
    "HunyuanVideoImageToVideoPipeline": False,
    "CogVideoXImageToVideoPipeline": False,
    "SkyReelsV2ImageToVideoPipeline": True,
    "LTXImageToVideoPipeline": False,
    "LTX2ImageToVideoPipeline": False,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_take_pictures_row_by_row(i2v: Path, tmp_path: Path, name: str) -> None:
    source = Source(model="m", folder=i2v, revision=None, pipeline=getattr(diffusers, name), components={})
    table = tmp_path / "rows.csv"
    table.write_text("prompt,image\na b,up.png\n")
    options: dict[str, Any] = {"out": tmp_path, "model": "m"}
    assert call_arguments(source, EvaluateOptions(prompts=table, **options)) == {}  # the picture is a row's, not ours
    both = EvaluateOptions(prompts=i2v / "rows.csv", **options)
    if PIPELINES[name]:
        assert call_arguments(source, both) == {}
    else:
        with pytest.raises(ClipError, match="takes no --last-image"):
            call_arguments(source, both)


def test_each_prompt_gets_its_own_pictures_as_generate_would(i2v: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "half.yaml"
    sparse.write_text("{sparsity: 0.5, block_size: 16, top_p: 0.0}\n")
    out = tmp_path / "out"
    words = ["--model", i2v / "wan-i2v", "--prompts", i2v / "rows.csv", "--config", sparse, "--no-lpips"]
    result = command("evaluate", *words, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    told = json.loads((out / "manifest.json").read_text())["settings"]["pictures"]
    assert told["a b"]["image"]["sha256"] == told["c d"]["last_image"]["sha256"] != told["c d"]["image"]["sha256"]
    with (out / "clips.csv").open(newline="") as file:
        clips = {(each["prompt"], each["mode"]): each["video"] for each in csv.DictReader(file)}

    pictures = ["--image", i2v / "round.png", "--last-image", i2v / "up.png"]
    again = ["--prompt", "c d", "--config", sparse, "--compare", "--out", tmp_path / "c.mp4"]
    single = generate(i2v / "wan-i2v", *SMALL, *pictures, *again)
    assert single.exit_code == 0, single.output
    assert (tmp_path / "c-full.mp4").read_bytes() == (out / clips["c d", "full"]).read_bytes()
    assert (tmp_path / "c.mp4").read_bytes() == (out / clips["c d", "half"]).read_bytes()
    assert (tmp_path / "c-full.mp4").read_bytes() != (out / clips["a b", "full"]).read_bytes()


def test_a_missing_picture_is_told_before_anything_is_loaded(i2v: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,image\na b,gone.png\n")
    options = EvaluateOptions(out=tmp_path, model=str(i2v / "wan-i2v"), prompts=tmp_path / "rows.csv", device="cpu")
    with pytest.raises(ClipError, match=r"gone\.png; allowed: a picture file"):
        evaluation_of(options, source_of(options), device_of("cpu"))
    rows = EvaluateOptions(out=tmp_path, model=str(i2v / "wan-i2v"), prompts=i2v / "rows.csv", device="cpu")
    call = evaluation_of(rows, source_of(rows), device_of("cpu")).call_of(Pair(prompt="c d", seed=0))
    assert call["last_image"].tobytes() == Image.open(i2v / "up.png").tobytes()


@pytest.mark.parametrize(("steps", "dense"), [(4, {"sol": 1, "svg": 0}), (8, {"sol": 2, "svg": 1})])
def test_few_steps_without_guidance_under_presets_by_name(
    arguments: list[str], tmp_path: Path, steps: int, dense: dict[str, int]
) -> None:
    """A distilled sampler: the share of dense steps goes with their number; two layers, of which the first is dense."""
    names = [f"hunyuan-video-t2v-{whose}" for whose in dense]
    words = [*arguments[: arguments.index("--seeds")], "--height", "32", "--width", "32", "--frames", "8", "--no-lpips"]
    presets = [word for name in names for word in ("--preset", name)]
    out = tmp_path / "out"
    result = evaluate([*words, "--device", "cpu"], out, "--steps", steps, "--guidance", 1, *presets)
    assert result.exit_code == 0, result.output
    by_mode = {each["mode"]: each for each in rows(out, "summary.csv")}
    assert list(by_mode) == ["full", "full-other-kernel", *names]
    for name, count in zip(names, dense.values(), strict=True):
        density, computed = (float(by_mode[name][column]) for column in ("density", "computed"))
        assert density < 0.9
        assert computed == pytest.approx((steps + count + (steps - count) * density) / (2 * steps))


def test_dense_steps_that_leave_nothing_sparse_are_told_before_the_first_clip(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "warm.yaml").write_text("{dense_steps: 4, block_size: 32}\n")
    words = [*arguments[: arguments.index("--sparsity")], "--device", "cpu", "--no-lpips"]
    result = evaluate(words, tmp_path / "out", "--steps", 4, "--config", tmp_path / "warm.yaml")
    assert result.exit_code == 1
    assert "warm: all 4 steps are dense" in result.output
    assert not (tmp_path / "out" / "videos").exists()


def test_another_scheduler_keeps_the_configuration_they_share() -> None:
    pipe = SimpleNamespace(scheduler=diffusers.UniPCMultistepScheduler(num_train_timesteps=900, flow_shift=3.0))
    _change_scheduler(pipe, {"class": "FlowMatchEulerDiscreteScheduler", "shift": 8.0})
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert (pipe.scheduler.config.num_train_timesteps, pipe.scheduler.config.shift) == (900, 8.0)
    with pytest.raises(ClipError, match=r"got flow_shift; allowed: class, .*shift"):
        _change_scheduler(pipe, {"flow_shift": 8.0})
    for wrong in ("UNet2DModel", "Euler", 3):
        with pytest.raises(ClipError, match="allowed: a scheduler of the installed diffusers"):
            _change_scheduler(pipe, {"class": wrong})
