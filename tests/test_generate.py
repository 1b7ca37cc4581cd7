"""`rectified-spaattn generate` with real pipelines of tiny random components, saved to folders and loaded again."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import rectified_spaattn
import tiny
import tiny_pipelines
from clip_runs import SHORT_TEXT, WAN, generate, told
from rectified_spaattn.config import SparseConfig
from rectified_spaattn.lab.clips import clip, models, single
from rectified_spaattn.lab.clips.options import ClipError, GenerateOptions
from rectified_spaattn.lab.clips.summary import plain
from rectified_spaattn.lab.pages.video import to_uint8, write_clip, write_frames

pytestmark = pytest.mark.usefixtures("one_thread")

HUNYUAN = ["--prompt", "a b c", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, *SHORT_TEXT]
HUNYUAN += ["--argument", f"prompt_template={json.dumps(tiny.PROMPT_TEMPLATE)}"]
SMALL = ["--height", 64, "--width", 64]  # three blocks of 16 tokens, in place of twelve


@pytest.fixture(scope="module")
def wan_run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with --compare: the video, and what was printed."""
    out = tmp_path_factory.mktemp("wan") / "new" / "video.mp4"
    config = models / "dense-first.yaml"
    config.write_text((models / "sparse.yaml").read_text().replace("{", "{dense_steps: 1, "))
    result = generate(models / "wan", *WAN, "--negative-prompt", "d", "--config", config, "--compare", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_the_video_has_the_frames_asked_for(wan_run: tuple[Path, str]) -> None:
    out, printed = wan_run
    assert iio.imread(out).shape == (9, 128, 128, 3)
    assert iio.immeta(out)["fps"] == 16
    assert f"Written: {out}" in printed
    assert "sparse: 12 calls" in printed
    assert "dense:  6 calls, because of dense_steps" in printed


def test_the_density_of_every_step_adds_up_to_that_of_the_run(wan_run: tuple[Path, str]) -> None:
    got = told(wan_run[0])
    densities = [step["density"] for step in got["output"]["steps"]]
    assert densities[0] == 1.0
    assert all(0 < density < 0.5 for density in densities[1:])
    assert math.isclose(sum(densities) / 3, got["stats"]["overall_density"])
    assert math.isclose(sum(densities[1:]) / 2, got["stats"]["density"])
    assert f"density {densities[-1]:.1%}" in wan_run[1]
    assert all(step["seconds"] > 0 for step in got["output"]["steps"])


def test_the_json_holds_what_the_run_was_made_with(wan_run: tuple[Path, str]) -> None:
    got = told(wan_run[0])
    assert got["model"]["pipeline"] == "WanPipeline"
    assert got["model"]["transformers"] == {"transformer": "WanTransformer3DModel"}
    assert got["versions"]["torch"] == torch.__version__
    assert {"diffusers", "triton", "transformers", "rectified-spaattn"} <= set(got["versions"])
    assert got["call"]["guidance_scale"] == 5.0  # the pipeline's default, not asked for
    assert got["call"]["max_sequence_length"] == 12
    assert got["call"]["negative_prompt"] == "d"
    assert got["request"]["seed"] == 0
    assert got["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert got["scheduler"]["config"]["shift"] == 7.0
    assert got["configs"]["transformer"]["block_size"] == 16
    assert got["configs"]["transformer"]["dense_steps"] == 1
    assert got["stats"]["backend"] == "torch"
    assert len(got["stats"]["layers"]) == 3
    assert got["output"]["peak_memory_bytes"] is None


def test_the_recorded_command_makes_the_same_video_bit_for_bit(wan_run: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = wan_run
    again = tmp_path / "again.mp4"
    words = shlex.split(told(out)["command"])
    assert words[:2] == ["rectified-spaattn", "generate"]
    words[words.index(str(out))] = str(again)
    words.remove("--compare")
    result = generate(*words[2:])
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == out.read_bytes()
    other = tmp_path / "other.mp4"
    words[words.index(str(again))] = str(other)
    assert generate(*words[2:], "--seed", 1).exit_code == 0
    assert other.read_bytes() != out.read_bytes()


def test_compare_writes_full_attention_and_both_side_by_side(wan_run: tuple[Path, str], models: Path) -> None:
    out, printed = wan_run
    got = told(out)["compare"]
    full, sparse = got["scores"]
    assert (full["mode"], full["psnr"], full["computed"]) == ("full", None, 1.0)
    assert sparse["mode"] == "sparse"
    assert sparse["computed"] == told(out)["stats"]["overall_density"]
    assert sparse["psnr"] > 10
    assert 0 < sparse["ssim"] < 1
    lines = [line.split("|") for line in printed.splitlines() if "| ours, 80%" in line]
    shown = [f"{sparse['psnr']:.2f}", f"{sparse['ssim']:.4f}", f"{sparse['flicker']:.4f}"]
    assert [row[2].strip() for row in lines] == [*shown, f"{100 * sparse['computed']:.1f}%"]
    assert lines[0][4].strip() == f"{sparse['psnr_frame_worst']:.2f}"
    seconds = [[step["seconds"] for step in run["steps"][1:]] for run in (got["full"], told(out)["output"])]
    assert math.isclose(sparse["speedup"], sum(seconds[0]) / sum(seconds[1]))
    side = iio.imread(out.with_name("video-compare.mp4"))
    assert side.shape[0] == 9
    assert side.shape[2] > 2 * 256
    pipe = WanPipeline.from_pretrained(models / "wan")
    pipe.set_progress_bar_config(disable=True)
    untouched = tiny.run_wan(pipe, steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    write_frames(out.with_name("untouched.mp4"), to_uint8(untouched[0]), 16)
    assert out.with_name("video-full.mp4").read_bytes() == out.with_name("untouched.mp4").read_bytes()
    assert out.with_name("video-full.mp4").read_bytes() != out.read_bytes()


def test_hunyuan_video_takes_what_has_no_option_as_argument(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "h.mp4"
    result = generate(models / "hunyuan", *HUNYUAN, "--config", models / "sparse.yaml", "--fps", 24, "--out", out)
    assert result.exit_code == 0, result.output
    assert iio.imread(out).shape == (9, 64, 64, 3)
    assert iio.immeta(out)["fps"] == 24
    assert told(out)["call"]["prompt_template"] == tiny.PROMPT_TEMPLATE
    assert told(out)["stats"]["sparse_calls"] == 3 * 2


def test_two_experts_take_a_config_each_and_sparsity_overrides_both(models: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text((models / "sparse.yaml").read_text().replace("{", "{dense_layers: [0], "))
    configs = ["--config", models / "sparse.yaml", "--config", second, "--sparsity", 0.7]
    out = tmp_path / "v.mp4"
    result = generate(models / "wan-2", *WAN, *configs, "--out", out)
    assert result.exit_code == 0, result.output
    got = told(out)["configs"]
    assert list(got) == ["transformer", "transformer_2"]
    assert [each["sparsity"] for each in got.values()] == [0.7, 0.7]
    assert [each["dense_layers"] for each in got.values()] == [[], [0]]
    assert told(out)["stats"]["dense_reasons"]["dense_layers"] > 0


def test_the_preset_is_the_models_own_and_a_clip_of_less_than_a_block_is_told(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    result = generate(models / "wan", *WAN, *SMALL, "--out", out)  # no block of 128
    assert result.exit_code == 0, result.output
    assert told(out)["configs"]["transformer"]["dense_steps"] == 0.1
    assert told(out)["configs"]["transformer"]["dense_layers"] == [0, 1]
    assert told(out)["stats"]["sparse_calls"] == 0
    assert told(out)["stats"]["density"] is None
    assert "no attention call ran sparse" in result.output
    named = generate(models / "wan", *WAN, *SMALL, "--preset", "wan2.1-i2v", "--out", out, "--overwrite")
    assert named.exit_code == 0, named.output
    assert told(out)["configs"]["transformer"]["dense_steps"] == 0


def test_text_and_image_to_video_share_the_weights_of_ti2v(models: Path, tmp_path: Path) -> None:
    picture = tmp_path / "first.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(picture)
    made = []
    for image in ([], ["--image", picture]):
        out = tmp_path / f"{len(made)}.mp4"
        result = generate(models / "ti2v", *WAN, *SMALL, "--config", models / "sparse.yaml", *image, "--out", out)
        assert result.exit_code == 0, result.output
        made.append(out)
    text, both = map(told, made)
    assert text["model"]["pipeline"] == "WanPipeline"
    assert text["image_sha256"] is None
    assert both["model"]["pipeline"] == "WanImageToVideoPipeline"
    assert len(both["image_sha256"]) == 64
    assert made[0].read_bytes() != made[1].read_bytes()


def test_the_scheduler_can_be_changed_and_is_recorded(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    words = [models / "wan", *WAN, *SMALL, "--config", models / "sparse.yaml", "--overwrite", "--out", out]
    assert generate(*words, "--scheduler", "shift=3.0").exit_code == 0
    assert told(out)["scheduler"]["config"]["shift"] == 3.0
    result = generate(*words, "--scheduler", "flow=3.0")
    assert result.exit_code == 1
    assert "--scheduler: got flow; allowed: class, num_train_timesteps, shift," in result.output


def test_teacache_skips_steps_of_the_sparse_run_and_none_of_full_attention(models: Path, tmp_path: Path) -> None:
    words = [models / "wan", *WAN, *SMALL, "--steps", 8, "--config", models / "sparse.yaml", "--compare", "--out"]
    assert generate(*words, tmp_path / "plain.mp4").exit_code == 0
    out = tmp_path / "v.mp4"
    result = generate(*words, out, "--teacache", "--teacache-threshold", 10)
    assert result.exit_code == 0, result.output
    assert "threshold 10" in result.output
    got = told(out)
    assert got["teacache"]["branches"][0]["skipped_steps"] == [5, 6]  # the first 5 and the last are always computed
    skipped = [step for step, each in enumerate(got["output"]["steps"]) if each["density"] is None]
    assert skipped == [5, 6]
    assert got["summary"][1].startswith("TeaCache")
    assert "+ TeaCache" in got["compare"]["scores"][1]["label"]
    assert (tmp_path / "v-full.mp4").read_bytes() == (tmp_path / "plain-full.mp4").read_bytes()
    assert out.read_bytes() != (tmp_path / "plain.mp4").read_bytes()


def test_a_pipeline_without_a_step_callback_is_watched_by_its_progress_bar() -> None:
    """HunyuanVideo 1.5; an exception leaves no bar of ours behind, either."""
    pipeline = tiny_pipelines.hunyuan15()
    arguments = tiny_pipelines.hunyuan15_arguments() | {"num_inference_steps": 3}
    mode = clip.Mode(
        name="sparse", label="", configs=(SparseConfig(block_size=16, sparsity=0.8, top_p=0.0, dense_steps=1),)
    )
    seen: list[tuple[int, int, float | None]] = []

    def on_step(*step: Any) -> None:
        seen.append(step)
        if len(seen) == 5:
            raise KeyError("stop")

    [made] = clip.generate(pipeline, mode, [clip.Pair(prompt=None, seed=0)], arguments, on_step=on_step)  # type: ignore[arg-type]
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert made.densities[0] == 1.0
    assert made.densities[1] == made.densities[2] == pytest.approx(made.density)
    assert 0 < made.density < 0.7
    assert len(made.steps) == 3
    with pytest.raises(KeyError):
        clip.generate(pipeline, mode, [clip.Pair(prompt=None, seed=0)], arguments, on_step=on_step)  # type: ignore[arg-type]
    assert "progress_bar" not in vars(pipeline)


def test_nothing_stays_on_where_something_that_was_asked_for_cannot_be_had() -> None:
    pipe = tiny.wan_pipeline()
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    mode = clip.Mode(name="sparse", label="sparse", configs=(SparseConfig(block_size=16),), teacache=True)
    with (
        rectified_spaattn.enable_teacache(pipe),
        pytest.raises(ClipError, match="TeaCache is enabled on"),
        clip.enabled(pipe, mode),
    ):
        pass
    after = [block.attn1.processor for block in pipe.transformer.blocks]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_compile_compiles_the_repeated_blocks(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(tiny.WanTransformer3DModel, "compile_repeated_blocks", lambda self, **how: seen.append(how))
    result = generate(
        models / "wan-2", *WAN, "--config", models / "sparse.yaml", "--compile", "--out", tmp_path / "v.mp4"
    )
    assert result.exit_code == 0, result.output
    assert seen == [{"fullgraph": True}] * 2


def flux_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, vocab_size=64, pad_token_id=1
    )
    text = T5Config(d_ff=16, d_kv=4, d_model=16, num_heads=4, num_layers=1, vocab_size=64, pad_token_id=1)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(sample_size=32, block_out_channels=(4,), norm_num_groups=1, latent_channels=1, shift_factor=0.1)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tiny._tokenizer(),
        text_encoder_2=T5EncoderModel(text).eval(),
        tokenizer_2=tiny._tokenizer(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_model_of_pictures_writes_a_png(tmp_path: Path) -> None:
    arguments = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 12}
    [made] = clip.generate(flux_pipeline(), clip.full_mode(), [clip.Pair(prompt="a b c", seed=0)], arguments)
    assert made.densities == (1.0, 1.0)
    write_clip(tmp_path / "p.png", made.video, 16)
    assert iio.imread(tmp_path / "p.png").shape == (32, 48, 3)
    rows = single.compare(made, made)
    assert [row.scores["psnr"].mean for row in rows] == [math.inf, math.inf]
    assert "flicker" not in rows[0].scores  # a picture has none
    source = models.Source(model="flux", folder=tmp_path, revision=None, pipeline=FluxPipeline, components={})
    options = GenerateOptions(model="flux", prompt="a", out=tmp_path / "p2.png")
    assert single.outputs_of(options, source).json == tmp_path / "p2.json"
    with pytest.raises(ClipError, match=r"ends with \.png"):
        single.outputs_of(GenerateOptions(model="flux", prompt="a", out=Path("v.mp4")), source)


def run_again(models: Path, out: Path, *words: Any) -> None:
    result = generate(models / "wan", *WAN, *SMALL, "--config", models / "sparse.yaml", "--out", out, *words)
    assert result.exit_code == 0, result.output


def test_a_second_run_needs_overwrite_and_leaves_no_comparison_of_the_first(models: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "v.mp4", tmp_path / "v-notes.mp4"
    mine.write_text("mine")
    run_again(models, out, "--compare")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"v.mp4", "v.json", "v-full.mp4", "v-compare.mp4", "v-notes.mp4"}
    refused = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--seed", 1, "--out", out)
    assert refused.exit_code == 1
    assert "v.mp4" in refused.output
    assert "v-full.mp4" in refused.output
    assert "--overwrite" in refused.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run_again(models, out, "--seed", 1, "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"v.mp4", "v.json", "v-notes.mp4"}
    assert "compare" not in told(out)
    assert out.read_bytes() != before[out]


def test_files_that_merely_have_the_names_of_comparisons_stay(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "v-full.mp4"
    other.write_text("mine")
    run_again(models, tmp_path / "v.mp4")
    run_again(models, tmp_path / "v.mp4", "--overwrite")
    assert other.read_text() == "mine"
    run_again(models, tmp_path / "w.mp4", "--compare")
    (tmp_path / "w.mp4").unlink()
    (tmp_path / "w.json").unlink()
    refused = generate(models / "wan", *WAN, "--compare", "--out", tmp_path / "w.mp4")
    assert refused.exit_code == 1
    assert "w-full.mp4" in refused.output


def test_plain_values_are_what_json_can_hold() -> None:
    value = {"a": (1, math.nan), "b": Path("x"), "c": torch.bfloat16, "d": SparseConfig()}
    got = plain(value)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["a"] == [1, None]
    assert got["c"] == "bfloat16"
    assert SparseConfig.from_dict(got["d"]) == SparseConfig()


def test_help_names_every_option() -> None:
    printed = generate("--help").output
    for field in dataclasses.fields(GenerateOptions):
        assert ("model" if field.name == "model" else "--" + field.name.replace("_", "-")) in printed


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_on_a_gpu_with_every_offload(offload: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    words = ["--config", models / "sparse.yaml", "--device", "cuda", "--offload", offload, "--out", out]
    result = generate(models / "wan", *WAN, *words)
    assert result.exit_code == 0, result.output
    assert iio.imread(out).shape == (9, 128, 128, 3)
    assert told(out)["output"]["peak_memory_bytes"] > 0
    assert told(out)["dtypes"] == {"vae": "float32", "text_encoder": "bfloat16", "transformer": "bfloat16"}


@pytest.mark.gpu
def test_on_a_gpu_without_room_for_the_weights(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**30))
    result = generate(models / "wan", *WAN, "--device", "cuda")
    assert result.exit_code == 1
    assert "Not enough GPU memory" in result.output
