"""`rectified-spaattn generate`: what cannot be done is said before the first step, in a sentence, with what can."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from clip_runs import WAN, generate
from rectified_spaattn.lab.clips import models as loading
from rectified_spaattn.lab.clips.options import ClipError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No denoising step may run."""

    def forward(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.WanTransformer3DModel.forward", forward)


@pytest.mark.parametrize("package", ["ftfy", "transformers"])
def test_missing_packages_are_named(
    package: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "first.png"
    Image.new("RGB", (16, 16)).save(picture)
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else object())
    result = generate(models / "ti2v", *WAN, "--image", picture)
    assert result.exit_code == 1
    assert package in result.output
    assert 'pip install ".[generate]"' in result.output


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--sparsity", 1.5], 2, "sparsity: got 1.5; allowed: a number in [0, 1)"),
        (["--preset", "wan3"], 2, "preset: got 'wan3'; allowed: one of"),
        (["--steps", 0], 2, "allowed: 1 or more"),
        (["--seed", 2**64], 2, "seed: got 18446744073709551616; allowed: "),
        (["--dtype", "int8"], 2, "allowed: one of"),
        (["--teacache-threshold", 0.1], 2, "without --teacache"),
        (["--config", "nowhere.yaml"], 2, "got no such file"),
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
            {"transformer": ["diffusers", "PixArtTransformer2DModel"]},
            "got PixArtTransformer2DModel; allowed: a pipeline with",
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
    loading.check_memory(sizes, 41 * gib, "none")
    loading.check_memory(sizes, 29 * gib, "model")
    loading.check_memory(sizes, 1 * gib, "group")
    with pytest.raises(ClipError, match=r"all weights take 40\.0 GiB, 39\.0 GiB are free.*--offload model"):
        loading.check_memory(sizes, 39 * gib, "none")
    with pytest.raises(ClipError, match=r"the largest component, transformer, take.* 28\.0 GiB.*--offload group"):
        loading.check_memory(sizes, 24 * gib, "model")


def test_memory_that_runs_out_during_the_run_is_explained(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.WanTransformerBlock.forward", forward)
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", tmp_path / "v.mp4")
    assert result.exit_code == 1, result.output
    assert "The GPU's memory ran out: CUDA out of memory. Tried to allocate 9.00 GiB." in result.output
    assert "Use --offload model (or group, which needs least), a smaller --height" in result.output


def folder_in_place(folder: Path) -> Path:
    (folder / "v.mp4").mkdir()
    return folder / "v.mp4"


def file_for_a_folder(folder: Path) -> Path:
    (folder / "taken").write_text("mine")
    return folder / "taken" / "v.mp4"


def dangling_link(folder: Path) -> Path:
    (folder / "v.mp4").symlink_to(folder / "gone.mp4")
    return folder / "v.mp4"


def unrelated_json(folder: Path) -> Path:
    (folder / "v.json").write_text("mine")
    return folder / "v.mp4"


def existing_video(folder: Path) -> Path:
    (folder / "v.mp4").write_text("mine")
    return folder / "v.mp4"


def folder_as_json(folder: Path) -> Path:
    (folder / "v.json").mkdir()
    return folder / "v.mp4"


def name_too_long(folder: Path) -> Path:
    return folder / f"{'a' * 300}.mp4"


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (folder_in_place, "which is a folder"),
        (file_for_a_folder, "cannot be written"),
        (dangling_link, "a link to what is not there"),
        (unrelated_json, "v.json is there already. Use another name, or --overwrite"),
        (existing_video, "v.mp4 is there already"),
        (folder_as_json, "which is a folder"),
        (name_too_long, "cannot be written"),
    ],
)
def test_files_that_cannot_be_written_are_told_before_the_first_step(
    make: Any, says: str, models: Path, tmp_path: Path
) -> None:
    out = make(tmp_path)
    before = {path: path.read_text() if path.is_file() else "" for path in tmp_path.rglob("*")}
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", out)
    assert result.exit_code == 1, result.output
    assert says in result.output
    assert "Traceback" not in result.output
    assert {path: path.read_text() if path.is_file() else "" for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("no_step")
def test_a_folder_that_may_not_be_written_to(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may do everything
    result = generate(models / "wan", *WAN, "--out", tmp_path / "a" / "b" / "v.mp4")
    assert result.exit_code == 1
    assert f"{tmp_path} may not be written to" in result.output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "got a list; allowed: one mapping"),
        ("\udcff", "cannot be read as JSON"),
        ('{"_class_name": "WanPipeline", "transformer": []}', "without a transformer"),
        ('{"_class_name": ["a"], "transformer": ["diffusers"]}', "got the pipeline ['a']"),
        ('{"_class_name": "logging"}', "got the pipeline 'logging'"),
    ],
)
def test_a_broken_model_index_is_named(text: str, says: str, tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    result = generate(tmp_path, "--prompt", "a", "--out", tmp_path / "v.mp4")
    assert result.exit_code == 1, result.output
    assert says in result.output
    assert str(tmp_path) in result.output
    assert "Traceback" not in result.output


def copy_of(model: Path, to: Path) -> Path:
    """The folder by links, so that single files can be replaced."""
    for path in model.rglob("*"):
        if path.is_file():
            (to / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(model)).hardlink_to(path)
    return to


def weights_of(model: Path) -> Path:
    return next((model / "transformer").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "bin", "missing", "empty config", "other shapes"])
def test_weights_that_cannot_be_loaded_are_one_sentence_with_the_folder(
    damage: str, models: Path, tmp_path: Path
) -> None:
    model = copy_of(models / "wan", tmp_path / "model")
    weights, config = weights_of(model), model / "transformer" / "config.json"
    data, settings = weights.read_bytes(), json.loads(config.read_text())
    if damage in ("truncated", "bin", "missing"):
        weights.unlink()
    else:
        config.unlink()
    if damage == "truncated":
        weights.write_bytes(data[:1000])
    elif damage == "bin":
        torch.save({"x": torch.zeros(2)}, weights.with_name("diffusion_pytorch_model.bin"))
    elif damage == "empty config":
        config.write_text("")
    elif damage == "other shapes":
        config.write_text(json.dumps(settings | {"ffn_dim": 64}))
    result = generate(model, *WAN, "--out", tmp_path / "v.mp4")
    assert result.exit_code == 1, result.output
    assert f"the pipeline in {model} could not be loaded" in result.output
    assert "Traceback" not in result.output


def test_weights_that_could_run_code_are_never_loaded(models: Path, tmp_path: Path) -> None:
    """A pickle beside no safetensors is refused, whatever is in it."""
    model, ran = copy_of(models / "wan", tmp_path / "model"), tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    for weights in model.rglob("*.safetensors"):
        name = weights.name.replace(".safetensors", ".bin").replace("model.bin", "pytorch_model.bin")
        weights.unlink()
        torch.save(Evil(), weights.with_name(name if "diffusion" not in name else "diffusion_pytorch_model.bin"))
    assert generate(model, *WAN, "--out", tmp_path / "v.mp4").exit_code == 1
    assert not ran.exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 50_000, "sparsity: 0.8\n\tx", "sparsity: !!python/object/apply:os.getcwd []", "\x00"]
)
def test_yaml_that_is_deep_exponential_or_wrong_is_refused_with_its_file(
    text: str, models: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    for words in (["--config", config], ["--argument", f"max_sequence_length={text}"] if "\x00" not in text else []):
        result = generate(models / "wan", *WAN, *words, "--out", tmp_path / "v.mp4") if words else None
        if result is not None:
            assert result.exit_code == 2, result.output
            assert ("c.yaml" if "--config" in words else "argument: got") in result.output
            assert "Traceback" not in result.output


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    from clip_runs import command

    (tmp_path / "model_index.json").write_text("{")
    result = command("--debug", "generate", tmp_path, "--prompt", "a")
    assert isinstance(result.exception, ClipError)
    assert isinstance(result.exception.__cause__, ValueError)


def test_markup_in_prompts_and_paths_is_printed_as_it_is(models: Path, tmp_path: Path) -> None:
    words = [each for each in WAN if each not in ("--prompt", "a b c")]
    out = tmp_path / "[bold] [/bold] [red" / "v [/].mp4"
    result = generate(
        models / "wan", *words, "--prompt", "a [/bold] b :smile:", "--config", models / "sparse.yaml", "--compare",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"Written: {out}" in result.output
    assert out.is_file()


def test_a_full_disk_leaves_what_was_there(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "v.mp4"
    out.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--overwrite", "--out", out)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert "v.mp4" in result.output
    assert "Written" not in result.output
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.usefixtures("no_step")
def test_without_an_encoder_no_step_runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", tmp_path / "v.mp4")
    assert result.exit_code == 1
    assert "No mp4 can be written here" in result.output
    assert "Install imageio-ffmpeg" in result.output
