"""`rectified-spaattn generate` with real pipelines of tiny random components, saved to folders and loaded again."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from click.testing import Result
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from typer.testing import CliRunner

import rectified_spaattn
import tiny
from rectified_spaattn.cli.app import app
from rectified_spaattn.cli.generate_run import output_path
from rectified_spaattn.config import SparseConfig
from rectified_spaattn.generation import load, record
from rectified_spaattn.generation.request import GenerationError, Request
from rectified_spaattn.generation.run import run, switch_on
from rectified_spaattn.report.video import to_uint8, write_clip, write_mp4

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"COLUMNS": "300"}
SHORT_TEXT = ["--argument", "max_sequence_length=12"]
WAN = ["--prompt", "a b c", "--height", 128, "--width", 128, "--frames", 9, "--steps", 3, *SHORT_TEXT]
HUNYUAN = ["--prompt", "a b c", "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, *SHORT_TEXT]
HUNYUAN += ["--argument", f"prompt_template={json.dumps(tiny.PROMPT_TEMPLATE)}"]


def generate(*words: Any) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, words)], env=WIDE)


def told(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan, wan-2 (two experts), ti2v and hunyuan, each as save_pretrained writes it; sparse.yaml that fits them."""
    folder = tmp_path_factory.mktemp("models")
    wan = tiny.wan_pipeline()
    wan.save_pretrained(folder / "wan")
    wan.register_to_config(expand_timesteps=True)
    wan.save_pretrained(folder / "ti2v")
    tiny.wan_pipeline(experts=2).save_pretrained(folder / "wan-2")
    tiny.hunyuan_pipeline().save_pretrained(folder / "hunyuan")
    (folder / "sparse.yaml").write_text("{sparsity: 0.8, block_size: 16, top_p: 0.0, neighbours: false}\n")
    return folder


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
    words[words.index(str(again))], words[words.index("--seed") + 1] = str(other), "1"
    assert generate(*words[2:]).exit_code == 0
    assert other.read_bytes() != out.read_bytes()


def test_compare_writes_full_attention_and_both_side_by_side(wan_run: tuple[Path, str], models: Path) -> None:
    out, printed = wan_run
    got = told(out)["compare"]
    full, sparse = got["scores"]
    assert (full["mode"], full["psnr"], full["density"]) == ("full", None, 1.0)
    assert sparse["mode"] == "sparse"
    assert sparse["density"] == told(out)["stats"]["overall_density"]
    assert sparse["psnr"] > 10
    assert 0 < sparse["ssim"] < 1
    row = next(line.split("|") for line in printed.splitlines() if "rectified, 0.8 sparse" in line)
    shown = [f"{100 * sparse['density']:.1f}%", f"{sparse['psnr']:.2f}", f"{sparse['ssim']:.4f}"]
    assert [cell.strip() for cell in row[2:5]] == shown
    seconds = [[step["seconds"] for step in run["steps"][1:]] for run in (got["full"], told(out)["output"])]
    assert math.isclose(sparse["speedup"], sum(seconds[0]) / sum(seconds[1]))
    side = iio.imread(out.with_name("video-compare.mp4"))
    assert side.shape[0] == 9
    assert side.shape[2] > 2 * 256
    pipe = WanPipeline.from_pretrained(models / "wan")
    pipe.set_progress_bar_config(disable=True)
    untouched = tiny.run_wan(pipe, steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    write_mp4(out.with_name("untouched.mp4"), to_uint8(untouched[0]), 16)
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
    smaller = ["--height", 64, "--width", 64]  # 48 tokens, no block of 128
    result = generate(models / "wan", *WAN, *smaller, "--out", out)
    assert result.exit_code == 0, result.output
    assert told(out)["configs"]["transformer"]["dense_steps"] == 0.1
    assert told(out)["configs"]["transformer"]["dense_layers"] == [0, 1]
    assert told(out)["stats"]["sparse_calls"] == 0
    assert told(out)["stats"]["density"] is None
    assert "no attention call ran sparse" in result.output
    named = generate(models / "wan", *WAN, *smaller, "--preset", "wan2.1-i2v", "--out", out)
    assert named.exit_code == 0, named.output
    assert told(out)["configs"]["transformer"]["dense_steps"] == 0


def test_text_and_image_to_video_share_the_weights_of_ti2v(models: Path, tmp_path: Path) -> None:
    picture = tmp_path / "first.png"
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(picture)
    made = []
    for image in ([], ["--image", picture]):
        out = tmp_path / f"{len(made)}.mp4"
        result = generate(models / "ti2v", *WAN, "--config", models / "sparse.yaml", *image, "--out", out)
        assert result.exit_code == 0, result.output
        made.append(out)
    text, both = map(told, made)
    assert text["model"]["pipeline"] == "WanPipeline"
    assert text["image_sha256"] is None
    assert both["model"]["pipeline"] == "WanImageToVideoPipeline"
    assert len(both["image_sha256"]) == 64
    assert made[0].read_bytes() != made[1].read_bytes()


@pytest.mark.parametrize("package", ["ftfy", "transformers"])
def test_missing_packages_are_named(
    package: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "first.png"
    Image.new("RGB", (16, 16)).save(picture)
    monkeypatch.setattr(load, "find_spec", lambda name: None if name == package else object())
    result = generate(models / "ti2v", *WAN, "--image", picture)
    assert result.exit_code == 1
    assert package in result.output
    assert 'pip install "rectified-spaattn[generate]"' in result.output


def test_the_scheduler_can_be_changed_and_is_recorded(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    words = [models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", out]
    assert generate(*words, "--scheduler", "shift=3.0").exit_code == 0
    assert told(out)["scheduler"]["config"]["shift"] == 3.0
    result = generate(*words, "--scheduler", "flow=3.0")
    assert result.exit_code == 1
    assert "--scheduler: got flow; allowed: num_train_timesteps, shift," in result.output


def test_teacache_skips_steps_of_the_sparse_run_and_none_of_full_attention(models: Path, tmp_path: Path) -> None:
    words = [models / "wan", *WAN, "--steps", 8, "--config", models / "sparse.yaml", "--compare", "--out"]
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


def test_nothing_stays_on_where_something_that_was_asked_for_cannot_be_had() -> None:
    pipe = tiny.wan_pipeline()
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    request = Request(model="wan", prompt="a", teacache=True)
    with rectified_spaattn.enable_teacache(pipe), pytest.raises(GenerationError, match="TeaCache is enabled on"):
        switch_on(pipe, request, torch.device("cpu"))
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
    pipe = flux_pipeline()
    request = Request(model="flux", prompt="a b c", steps=2)
    arguments = {"prompt": "a b c", "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 12}
    made = run(pipe, request, arguments, torch.device("cpu"), None)
    assert made.densities == (1.0, 1.0)
    write_clip(tmp_path / "p.png", made.clip.video, 16)
    assert iio.imread(tmp_path / "p.png").shape == (32, 48, 3)
    source = load.Source(model="flux", folder=tmp_path, revision=None, pipeline=FluxPipeline, components={})
    assert output_path(request, source) == Path("generated.png")
    with pytest.raises(GenerationError, match=r"ends with \.png"):
        output_path(Request(model="flux", prompt="a", out=Path("v.mp4")), source)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--sparsity", 1.5], 2, "sparsity: got 1.5; allowed: a number in [0, 1)"),
        (["--preset", "wan3"], 2, "preset: got 'wan3'; allowed: one of"),
        (["--steps", 0], 2, "allowed: 1 or more"),
        (["--dtype", "int8"], 2, "allowed: one of"),
        (["--teacache-threshold", 0.1], 2, "without --teacache"),
        (["--config", "nowhere.yaml"], 2, "there is none at that path"),
        (["--argument", "height=3"], 2, "Use the option --height"),
        (["--argument", "max_sequence_length"], 2, "allowed: KEY=VALUE"),
        (["--argument", "a=[1"], 2, "allowed: a YAML value"),
        (["--argument", "true_cfg_scale=3"], 1, "takes no --argument true_cfg_scale"),
        (["--image", "first.png"], 1, "Use an image-to-video model"),
        (["--out", "picture.png"], 1, "a name that ends with .mp4"),
        (["--offload", "model"], 1, "there is no GPU to offload from"),
        (["--revision", "main"], 1, "for a repository alone"),
        (["--backend", "fa4"], 1, "backend='fa4' cannot run torch.float32 on cpu"),
        (["--height", 130], 1, "divisible by 16"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(
    words: list[Any], code: int, says: str, models: Path, tmp_path: Path
) -> None:
    words = [*words, *([] if "--out" in words else ["--out", tmp_path / "v.mp4"])]
    result = generate(models / "wan", *WAN, *words)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_config_with_an_unknown_key_is_refused(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("sparcity: 0.8\n")
    result = generate(models / "wan", *WAN, "--config", config)
    assert result.exit_code == 2
    assert "unknown key(s) ['sparcity']" in result.output


def test_a_config_that_is_no_yaml_is_refused(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("sparsity: [0.8\n")
    result = generate(models / "wan", *WAN, "--config", config)
    assert result.exit_code == 2
    assert "got a file that is no YAML" in result.output


def test_a_model_that_is_not_there_or_not_supported_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    prompt = ["--prompt", "a"]
    offline = generate("nobody/nothing", *prompt)
    assert offline.exit_code == 1
    assert "nobody/nothing is not in the local cache" in offline.output
    assert "`hf download nobody/nothing`" in offline.output
    assert "there is no such folder" in generate("./nothing", *prompt).output
    assert "without model_index.json" in generate(tmp_path, *prompt).output
    index = json.loads((models / "wan" / "model_index.json").read_text())
    for changes, says in (
        (
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "got SD3Transformer2DModel; allowed: a pipeline with",
        ),
        ({"_class_name": "NoPipeline"}, "got the pipeline 'NoPipeline'"),
        ({"transformer": [None, None]}, "a WanPipeline without a transformer"),
        ({}, "could not be loaded"),
        ({"_class_name": "WanImageToVideoPipeline"}, "Give one: --image FILE"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
        result = generate(tmp_path, *prompt)
        assert result.exit_code == 1
        assert says in result.output


@pytest.mark.parametrize(("kind", "says"), [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "no such rep")])
def test_what_the_hub_refuses_is_explained(kind: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*arguments: Any, **more: Any) -> None:
        response = SimpleNamespace(headers={}, request=None)
        raise getattr(huggingface_hub.errors, kind)("refused", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    result = generate("someone/model", "--prompt", "a")
    assert result.exit_code == 1
    assert says in result.output
    assert "hf auth login" in result.output


def test_weights_that_do_not_fit_are_refused_with_the_way_out() -> None:
    gib = 2**30
    sizes = {"transformer": 28 * gib, "text_encoder": 11 * gib, "vae": gib}
    load.check_memory(sizes, 41 * gib, "none")
    load.check_memory(sizes, 29 * gib, "model")
    load.check_memory(sizes, 1 * gib, "group")
    with pytest.raises(GenerationError, match=r"all weights take 40\.0 GiB, 39\.0 GiB are free.*--offload model"):
        load.check_memory(sizes, 39 * gib, "none")
    with pytest.raises(GenerationError, match=r"the largest component, transformer, take.* 28\.0 GiB.*--offload group"):
        load.check_memory(sizes, 24 * gib, "model")


def test_memory_that_runs_out_during_the_run_is_explained(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.WanTransformerBlock.forward", forward)
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", tmp_path / "v.mp4")
    assert result.exit_code == 1, result.output
    assert "The GPU's memory ran out: CUDA out of memory. Tried to allocate 9.00 GiB." in result.output
    assert "Use --offload model, a smaller --height and --width, or fewer --frames." in result.output


def test_plain_values_are_what_json_can_hold() -> None:
    value = {"a": (1, math.nan), "b": Path("x"), "c": torch.bfloat16, "d": SparseConfig()}
    got = record.plain(value)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["a"] == [1, None]
    assert got["c"] == "bfloat16"
    assert SparseConfig.from_dict(got["d"]) == SparseConfig()


def test_help_names_every_option() -> None:
    printed = generate("--help").output
    for field in dataclasses.fields(Request)[1:]:
        assert "--" + field.name.replace("_", "-") in printed


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
