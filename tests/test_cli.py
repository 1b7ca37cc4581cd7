"""The command: help, friendly errors, and the whole demo with a tiny random model."""

import json
import math
import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch

from clip_runs import command
from rectified_spaattn import SparseConfig, cli
from rectified_spaattn.lab.clips.demo import evaluation_of, ours_of, with_slider
from rectified_spaattn.lab.clips.options import DemoOptions

FILES = ("report.html", "metrics.json", "side-by-side.mp4", "side-by-side.webp")
MODES = ["full", "plain-90", "paper-90", "ours-90"]
SLIDER = ["ours-50", "ours-70", "ours-80", "ours-90", "ours-95"]
CAPTION = "a red matte sphere rolls right, grey floor"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def make_smaller(patch: pytest.MonkeyPatch) -> None:
    """Smaller videos, and steps that are timed sooner."""
    patch.setattr("rectified_spaattn.lab.clips.demo.WIDTH", 96)
    patch.setattr("rectified_spaattn.lab.clips.demo._TIMING_SIZE", 32)


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = ["--out", out, "--weights", weights, "--prompts", 1, "--size", 32, "--steps", 2, "--seeds", 2]
    with pytest.MonkeyPatch.context() as patch:
        make_smaller(patch)
        result = command("demo", *words)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_help_names_the_command_and_its_options() -> None:
    assert "demo" in command("--help").output
    result = command("demo", "--help")
    assert result.exit_code == 0
    for option in ("--out", "--quick", "--prompts", "--seeds", "--steps", "--size", "--sparsity", "--device"):
        assert option in result.output


def test_version() -> None:
    assert re.search(r"rectified-spaattn \d+\.\d+", command("--version").output)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sparsity", "1.5"], "sparsity"),
        (["--sparsity", "0.5", "--sparsity", "0.5"], "values that differ"),
        (["--device", "tpu"], "device: got 'tpu'; allowed: "),
        (["--backend", "fast"], "backend: got 'fast'; allowed: "),
        (["--steps", "0"], "allowed: 1 or more"),
        (["--size", "30"], "multiple of 4"),
        (["--block-size", "50"], "multiple of 16"),
        (["--prompts", "99"], "allowed: up to"),
        (["--prompt", "a red zebra"], "does not know 'zebra'"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = command("demo", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "matplotlib") else object())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert "typer, matplotlib" in str(stopped.value)
    assert 'pip install ".[demo]" in a checkout' in str(stopped.value)


def test_without_any_streams_it_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `rectified-spaattn ... >&-` and services start it."""
    monkeypatch.setattr("sys.argv", ["rectified-spaattn", "demo", "--steps", "0"])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_without_weights_the_message_says_what_to_do(tmp_path: Path) -> None:
    result = command("demo", "--weights", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no demo weights" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:rectified_spaattn")
def test_blocks_larger_than_the_clip_end_with_what_to_change(weights: Path, tmp_path: Path) -> None:
    words = ["--weights", weights, "--out", tmp_path, "--quick", "--size", 16, "--steps", 1, "--block-size", 512]
    result = command("demo", *words)
    assert result.exit_code == 1
    assert "Use a smaller block_size" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["demo"], ["doctor"], ["inspect"], ["generate", "model", "--prompt", "x"]])
def test_a_gpu_that_is_not_there_is_told_alike_by_every_command(words: list[str]) -> None:
    result = command(*words, "--device", "cuda")
    assert result.exit_code == 2
    assert "torch finds no CUDA GPU here. Use cpu" in result.output


def test_an_error_that_nobody_foresaw_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("rectified_spaattn.cli.demo.load", fail)
    result = command("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "ZeroDivisionError: by nothing" in result.output
    assert "--debug" in result.output
    assert isinstance(command("--debug", "demo", "--out", tmp_path / "out").exception, ZeroDivisionError)


def test_modes_differ_in_nothing_but_sparsity_rectification_and_order() -> None:
    default = DemoOptions()
    full, *sparse = evaluation_of(default, CPU).modes
    assert full.config is None
    assert [mode.name for mode in sparse] == MODES[1:]
    for mode in sparse:
        assert mode.config is not None
        same = mode.config.replace(sparsity=0.5, rectify="none", order="gilbert")
        assert same == default.paper(0.5).replace(rectify="none")
    assert evaluation_of(DemoOptions(sparsity=(0.875,)), CPU).modes[1].name == "plain-87.5"


def test_the_demo_shows_plain_sparse_the_paper_and_ours_and_a_quick_one_three_clips() -> None:
    paper, ours = SparseConfig.paper(), SparseConfig()
    plain = ("none", paper.order, False)
    shown = [plain, (paper.rectify, paper.order, False), (ours.rectify, ours.order, ours.neighbours)]
    for options, wanted in ((DemoOptions(), shown), (DemoOptions(quick=True), [plain, shown[2]])):
        evaluation = evaluation_of(options, CPU)
        configs = [mode.config for mode in evaluation.modes if mode.config is not None]
        assert [(config.rectify, config.order, config.neighbours) for config in configs] == wanted
        assert (len(evaluation.pairs) * len(evaluation.modes) == 3) == options.quick
        slider = with_slider(evaluation, options)
        assert len(slider.pairs) == 1
        assert [mode.name for mode in ours_of(slider.modes)] == (["ours-90"] if options.quick else SLIDER)


def test_demo_writes_every_file(run: tuple[Path, str]) -> None:
    out, printed = run
    assert all((out / name).stat().st_size > 1000 for name in FILES)
    assert {path.stem for path in (out / "figures").iterdir()} == {"error", "maps"}
    videos = sorted((out / "videos").rglob("*.mp4"))
    assert len(videos) == 2 * 4 + 4
    assert {path.parent.name for path in videos} == {*MODES, *SLIDER}
    assert iio.imread(videos[0]).shape == (16, 96, 96, 3)
    side = iio.imread(out / "side-by-side.mp4")
    assert side.shape[0] == 16
    assert 4 * 192 < side.shape[2] < 4 * 192 + 60
    verdict, link = printed.splitlines()[-2:]
    assert verdict.startswith("ours, 90%: ")
    assert link == f"Report: {(out / 'report.html').as_uri()}"


def test_metrics_json_agrees_with_itself_and_with_the_report(run: tuple[Path, str]) -> None:
    out, printed = run
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    assert [each["mode"] for each in metrics["means"]] == MODES
    assert len(metrics["clips"]) == 2 * 4
    assert [each["mode"] for each in metrics["slider"]] == SLIDER
    assert {(each["prompt"], each["seed"]) for each in metrics["clips"]} == {
        (prompt, seed) for prompt in {each["prompt"] for each in metrics["clips"]} for seed in (0, 1)
    }
    report = (out / "report.html").read_text()
    for mean in metrics["means"][1:]:
        clips = [each for each in metrics["clips"] if each["mode"] == mean["mode"]]
        for name in ("psnr", "ssim", "density", "seconds"):
            assert mean[name] == pytest.approx(math.fsum(each[name] for each in clips) / len(clips))
        assert f"{mean['psnr']:.2f}" in report
        assert f"{mean['psnr']:.2f}" in printed
        assert mean["backend"] == "torch"
    assert metrics["means"][0]["psnr"] is None
    density = {each["mode"]: each["density"] for each in metrics["means"]}
    assert density["plain-90"] == density["paper-90"] < 0.2
    assert density["plain-90"] < density["ours-90"] < density["plain-90"] + 1 / 64  # the same and pooled keys
    assert metrics["settings"]["seeds"] == 2
    assert [each["mode"] for each in metrics["speed"]] == ["full", "ours-90"]
    assert {"rectified-spaattn", "python", "torch", "diffusers"} <= set(metrics["versions"])


def test_a_second_run_replaces_the_videos_of_the_first_and_no_others(
    run: tuple[Path, str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = run
    make_smaller(monkeypatch)
    mine = [out / "videos" / "holiday.mp4", out / "videos" / "plain-90" / "mine.mp4", out / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    words = ["--out", out, "--weights", weights, "--size", 32, "--steps", 1, "--sparsity", 0.5, "--quick"]
    result = command("demo", *words, "--prompt", CAPTION)
    assert result.exit_code == 0, result.output
    videos = set((out / "videos").rglob("*.mp4"))
    assert videos - set(mine) == {
        out / "videos" / mode / f"{CAPTION}-0.mp4" for mode in ("full", "plain-50", "ours-50")
    }
    assert all(path.read_text() == "mine" for path in mine)
    assert json.loads((out / "metrics.json").read_text())["clips"][0]["prompt"] == CAPTION
