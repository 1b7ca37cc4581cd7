"""inspect: what is measured of one head, the pictures, and the command from end to end."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from attention_calls import smooth_call
from rectified_spaattn import SparseConfig
from rectified_spaattn.cli.app import app
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import AttentionCall, capture_calls
from rectified_spaattn.lab.calls.error import attention_error, block_masses
from rectified_spaattn.lab.calls.maps import HeadStudy, one_head, output_masses, study_head
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.pages.maps import KIND_COLOURS, maps_figure
from tiny import wan_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SparseConfig(block_size=16, order="gilbert", rectify="ipar+gapr", neighbours=False, top_p=0.0, sparsity=0.8)
SPARSITIES = (0.5, 0.8)
PLANNED = ("none", "pooled", "ipar", "ipar+gapr")  # the modes whose masses follow from R and P


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return one_head(smooth_call(), 1)


@pytest.fixture(scope="module")
def study(call: AttentionCall) -> HeadStudy:
    return study_head(call, CONFIG, SPARSITIES)


def test_one_head_is_that_head(call: AttentionCall) -> None:
    whole = smooth_call()
    assert call.q.shape == (1, 261, 1, 16)
    assert torch.equal(call.k[0, :, 0], whole.k[0, :, 1])
    for head in (-1, 2):
        with pytest.raises(ValueError, match=r"head: got -?\d; allowed: 0 to 1"):
            one_head(whole, head)


@pytest.mark.parametrize("mode", PLANNED)
@pytest.mark.parametrize("text", [0, 5])
def test_masses_read_off_the_output_are_those_of_the_plan(mode: str, text: int) -> None:
    """Two ways to the same numbers: values that tell their block, and R times the sparse masses plus P."""
    made = one_head(smooth_call(text=text), 0)
    config = CONFIG.replace(rectify=mode)
    measured = output_masses(made, config)
    stats = attention_error(made, config).stats
    planned = stats.r[0, 0, :, None] * block_masses(made, made.blocks(config), 0, stats.block_mask[0, 0])
    planned[:, :-1] += stats.probability[0, 0, :, :-1] * stats.compensated[0, 0]
    assert measured.shape == (16, 17)
    torch.testing.assert_close(measured, planned, atol=1e-5, rtol=1e-4)


def test_masses_of_every_mode_sum_to_one(study: HeadStudy) -> None:
    assert study.full.shape == (16, 17)
    torch.testing.assert_close(study.full.sum(1), torch.ones(16))
    places = [(sparsity, mode) for sparsity in SPARSITIES for mode in RECTIFY]
    assert list(study.results) == [(each.sparsity, each.rectify) for each in study.results.values()] == places
    for each in study.results.values():
        torch.testing.assert_close(each.masses.sum(1), torch.ones(16), atol=1e-5, rtol=1e-5)
        assert 0 <= each.misplaced <= 1
        assert each.misplaced + 1e-6 >= each.mass_error / 2


def test_nothing_is_lost_where_nothing_is_dropped(call: AttentionCall) -> None:
    for each in study_head(call, CONFIG, (0.0,)).results.values():
        assert each.relative_error == pytest.approx(0, abs=1e-5)
        assert (each.kept_mass, each.misplaced, each.mass_error) == pytest.approx((1, 0, 0), abs=1e-5)
        assert (each.density, each.compensated) == (1, 0)
        assert (each.kinds() == 0).all()


def test_mass_errors_are_what_they_are_defined_as(call: AttentionCall, study: HeadStudy) -> None:
    none = study.results[0.8, "none"]
    assert none.mass_error == pytest.approx(1 - none.kept_mass, abs=1e-5)  # the kept keys get everything
    assert none.mass_error == pytest.approx(none.misplaced, abs=1e-5)
    assert (none.r_error, none.compensated) == (pytest.approx(0, abs=1e-5), 0)
    for mode in ("pooled", "ipar", "ipar+gapr"):
        each = study.results[0.8, mode]
        r = attention_error(call, CONFIG.replace(rectify=mode)).stats.r[0, 0]
        true = (study.full[:, :-1] * ~each.compensated_mask).sum(1) + study.full[:, -1]
        assert each.r_error == pytest.approx((r - true).abs().mean().item(), abs=1e-5)
    ipar = study.results[0.8, "ipar"]  # nothing is rejected, so both sets are the same
    assert ipar.mass_error == pytest.approx(ipar.r_error, abs=1e-5)
    assert ipar.misplaced < none.misplaced
    with pytest.raises(KeyError):
        study.results[0.7, "none"]


def test_kinds_tell_the_three_sets_apart(study: HeadStudy) -> None:
    for each in study.results.values():
        kinds = each.kinds()
        assert torch.equal(kinds == 0, each.block_mask)
        assert torch.equal(kinds == 1, each.compensated_mask)
        assert not (each.block_mask & each.compensated_mask).any()
        assert int((kinds == 0).sum()) == {0.5: 8, 0.8: 3}[each.sparsity] * 16


def test_a_grid_below_one_block_is_refused(call: AttentionCall) -> None:
    with pytest.raises(ValueError, match="block_size: got 512 for 256 video tokens"):
        study_head(call, CONFIG.replace(block_size=512), SPARSITIES)


def test_the_picture_shows_the_masses_and_the_plan(study: HeadStudy, tmp_path: Path) -> None:
    path = tmp_path / "maps.png"
    maps_figure(path, study, 0.8, "ipar")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 1_000_000
    assert len(np.unique(pixels[::7], axis=0)) > 500  # two colour scales
    result = study.results[0.8, "ipar"]
    found = {}
    for kind, colour in KIND_COLOURS.items():
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        found[kind] = int((np.abs(pixels.astype(int) - rgb).max(1) <= 1).sum())
    critical = result.block_mask.float().mean().item()
    assert found["critical"] / (found["critical"] + found["compensated"]) == pytest.approx(critical, abs=0.05)
    assert found["rejected"] < found["critical"]  # the legend alone


def test_capture_takes_all_steps_from_one_run_and_stops_after_the_last() -> None:
    pipe, seen = wan_pipeline(), []
    arguments = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4}
    pairs = [Pair(prompt="a b c", seed=0)]
    calls = capture_calls(pipe, pairs, arguments, steps=[2, 0], layers=[1, 2], on_step=seen.append)
    assert seen == [1, 2, 3]
    places = [(layer, step, (3, 8, 8)) for step in (0, 2) for layer in (1, 2)]
    assert [(call.layer, call.step, call.layout.grid) for call in calls] == places
    again = capture_calls(pipe, pairs, arguments, steps=[2], layers=[2])  # as in a run of its own
    torch.testing.assert_close(calls[-1].q, again[0].q, rtol=0, atol=0)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_inspect_the_demo_model_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = invoke(
        "--out", out, "--layer", 4, "--head", 2, "--step", 1, "--steps", 2, "--height", 32, "--width", 32,
        "--sparsity", 0.9, "--sparsity", 0.75, "--device", "cpu", "--seed", 7,
    )  # fmt: skip
    assert code == 0, printed
    names = {"inspect.html", "inspect.json", "results.csv", "maps-75.png", "maps-90.png"}
    assert {path.name for path in out.iterdir()} == names
    told = json.loads((out / "inspect.json").read_text())
    assert (told["call"]["layer"], told["call"]["head"], told["call"]["step"], told["seed"]) == (4, 2, 1, 7)
    assert (told["call"]["grid"], told["call"]["num_blocks"]) == ([16, 8, 8], 16)
    assert [(row["sparsity"], row["rectify"]) for row in told["results"]] == [
        (sparsity, mode) for sparsity in (0.75, 0.9) for mode in RECTIFY
    ]
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, told["results"], strict=True):
        assert float(row["relative_error"]) == expected["relative_error"]
        assert f"{expected['relative_error']:.3f}" in printed
        assert row["command"].startswith("rectified-spaattn")
    page = (out / "inspect.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is linked to
    verdict = f"ours, 90%: {told['results'][-1]['density']:.1%} of the query-key pairs"
    for text in (
        "Layer 4, head 2, denoising step 1",
        "paper by content, 90%",
        verdict,
        f"{told['results'][0]['mass_error']:.3f}",
    ):
        assert text in page


@pytest.mark.usefixtures("undrawn")
def test_inspect_says_the_same_as_the_library(tmp_path: Path) -> None:
    from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
    from rectified_spaattn.lab.demo_model.prompts import PROMPTS

    out = tmp_path / "out"
    small = ("--steps", 2, "--height", 32, "--width", 32, "--device", "cpu", "--sparsity", 0.8)
    code, printed = invoke("--out", out, "--rectify", "ipar", "--order", "gilbert", *small)
    assert code == 0, printed
    told = json.loads((out / "inspect.json").read_text())
    assert (told["call"]["layer"], told["call"]["head"], told["call"]["step"]) == (2, 2, 1)  # the middle ones
    arguments = {"height": 32, "width": 32, "num_frames": 16, "num_inference_steps": 2}
    pairs = [Pair(prompt=PROMPTS[0], seed=0)]
    [whole] = capture_calls(load_demo_pipeline("cpu"), pairs, arguments, steps=[1], layers=[2])
    head = one_head(whole, 2)
    config = SparseConfig(block_size=64, order="gilbert", top_p=0.0, sparsity=0.8, rectify="ipar")
    row = next(row for row in told["results"] if row["rectify"] == "ipar")
    assert row["relative_error"] == pytest.approx(attention_error(head, config).relative_error, abs=1e-4)
    full = block_masses(head, head.blocks(config), 0)
    critical = attention_error(head, config).stats.block_mask[0, 0]
    kept = ((full[:, :-1] * critical).sum(1) + full[:, -1]).mean().item()
    assert row["kept_mass"] == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("mode", RECTIFY)
def test_a_head_sorted_by_content_is_studied_in_that_order(call: AttentionCall, mode: str) -> None:
    config = CONFIG.replace(rectify=mode, order="content")
    study = study_head(call, config, (0.8,), (mode,))
    (result,) = study.results.values()
    error = attention_error(call, config)
    assert error.stats.token_order is not None
    assert study.blocks.by_content
    assert result.relative_error == pytest.approx(error.relative_error, rel=1e-4)
    assert torch.equal(result.block_mask, error.stats.block_mask[0, 0])
    blocks, order = call.blocks(config), error.stats.token_order[0, 0]
    valid = torch.cat([torch.ones(256, dtype=torch.bool), call.text_mask[0]])
    logits = call.q[0, order, 0].double() @ call.k[0, :, 0].double().T / 4
    weights = logits.masked_fill(~valid, -math.inf).softmax(-1).view(16, 16, -1).mean(1)
    masses = weights[:, order].view(16, 16, 16).sum(2)
    torch.testing.assert_close(study.full[:, :16].double(), masses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(study.full[:, 16].double(), weights[:, blocks.isolated].sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("order", "label"), [("gilbert", "block"), ("content", "block, sorted by content")])
def test_axes_say_how_blocks_are_sorted(
    call: AttentionCall, order: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    study = study_head(call, CONFIG.replace(order=order), (0.8,), ("none", "row"))
    maps_figure(tmp_path / "maps.png", study, 0.8, "row")
    axes = [axis for axis in drawn[0].axes if axis.get_xlabel()]
    assert len(axes) == 8
    assert {axis.get_ylabel() for axis in axes} == {f"query {label}"}
    assert {axis.get_xlabel().split("   ")[0] for axis in axes} == {f"key {label}"}
    notes = [text.get_text() for axis in drawn[0].axes for text in axis.texts]
    assert any("sorted by content" in note for note in notes) == (order == "content")


@pytest.mark.usefixtures("undrawn")
def test_inspect_reads_the_folder_of_any_pipeline(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--model", models / "wan", "--prompt", "a b c", "--height", 128, "--width", 128, "--frames", 9)
    code, printed = invoke(*common, "--steps", 2, "--block-size", 32, "--out", out, "--device", "cpu")
    assert code == 0, printed
    told = json.loads((out / "inspect.json").read_text())
    assert (told["call"]["grid"], told["call"]["num_blocks"], told["call"]["isolated"]) == ([3, 8, 8], 6, 0)
    assert told["arguments"]["guidance_scale"] == 5.0  # the pipeline's default
    assert (told["config"]["rectify"], told["config"]["order"]) == ("query+slope", "content")
    assert told["config"]["dense_layers"] == [0, 1]  # the model's preset
    assert all(math.isfinite(row["relative_error"]) for row in told["results"])
    code, printed = invoke(*common, "--steps", 2, "--out", tmp_path / "none", "--device", "cpu", "--block-size", 256)
    assert code == 1
    assert "block_size: got 256 for 192 video tokens" in printed
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("undrawn")
def test_inspect_starts_from_an_image_and_takes_the_settings_of_a_file(models: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "first.png", tmp_path / "out"
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(picture)
    small = ("--height", 128, "--width", 128, "--frames", 9, "--steps", 2, "--device", "cpu", "--sparsity", 0.8)
    settings = ("--config", models / "sparse.yaml", "--rectify", "ipar")
    code, printed = invoke("--model", models / "ti2v", "--image", picture, *small, *settings, "--out", out)
    assert code == 0, printed
    told = json.loads((out / "inspect.json").read_text())
    assert told["arguments"]["image"] == str(picture)
    assert (told["config"]["block_size"], told["config"]["rectify"], told["config"]["top_p"]) == (16, "ipar", 0.0)
    code, printed = invoke("--model", models / "ti2v", "--image", tmp_path / "none.png", *small, "--out", out)
    assert code == 1
    assert "there is no such file" in printed


@pytest.mark.usefixtures("undrawn")
def test_inspect_sees_the_transformer_that_makes_the_step(models: Path, tmp_path: Path) -> None:
    small = ("--height", 128, "--width", 128, "--frames", 9, "--steps", 4, "--device", "cpu", "--sparsity", 0.8)
    last = ("--model", models / "wan-2", "--prompt", "a b c", "--block-size", 16, "--step", 3)
    code, printed = invoke(*last, *small, "--out", tmp_path / "out")
    assert code == 0, printed
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["call"]["step"] == 3


def test_inspect_refuses_a_folder_without_a_pipeline_and_a_pipeline_without_videos(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(other)
    for folder, told in ((empty, "without model_index.json"), (other, "DDPMPipeline")):
        code, printed = invoke("--model", folder, "--out", tmp_path / "out", "--device", "cpu")
        assert told in printed
        assert code == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--sparsity", 1.5), 2, "sparsity"),
        (("--rectify", "none"), 2, "rectify: got 'none'; allowed: one of ['pooled'"),
        (("--rectify", "more"), 2, "rectify: got 'more'"),
        (("--layer", -1), 2, "layer: got -1; allowed: 0 or more"),
        (("--device", "tpu"), 2, "allowed: auto, cpu or cuda"),
        (("--dtype", "int8"), 2, "dtype: got 'int8'"),
        (("--block-size", 50), 2, "multiple of 16"),
        (("--layer", 6), 1, "--layer: got 6; allowed: 0 to 4"),
        (("--step", 12), 1, "--step: got 12; allowed: 0 to 11"),
        (("--head", 4, "--steps", 1, "--height", 16, "--width", 16), 1, "head: got 4; allowed: 0 to 3"),
        (("--prompt", "a flying carpet", "--steps", 1), 1, "carpet"),
    ],
)
def test_inspect_refuses_with_what_is_allowed(
    arguments: tuple[object, ...], code: int, told: str, tmp_path: Path
) -> None:
    got, printed = invoke(*arguments, "--out", tmp_path / "out")
    assert told in printed
    assert got == code
    assert not (tmp_path / "out").exists()
