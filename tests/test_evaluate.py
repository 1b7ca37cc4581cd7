"""`rectified-spaattn evaluate` on tiny pipelines: what it writes, going on after a kill, several processes, errors."""

import json
import math
import re
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

import tiny
from clip_runs import LABELS, MODES, PAIRS, PRINTED, command, evaluate, rows
from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.clips import evaluate as work
from rectified_spaattn.lab.clips import metrics
from rectified_spaattn.lab.clips.clip import Mode, dense_kernel
from rectified_spaattn.lab.clips.folder import LOCK, MARK
from rectified_spaattn.lab.clips.models import source_of
from rectified_spaattn.lab.clips.modes import check_names, file_mode, grid_modes, reference_modes
from rectified_spaattn.lab.clips.options import EvaluateOptions, ModelOptions

pytestmark = pytest.mark.usefixtures("one_thread")

NO_LPIPS = "torchvision is not installed"


def test_every_file_is_there_and_nothing_else(finished: tuple[Path, str]) -> None:
    out, printed = finished
    files = {
        "manifest.json",
        "clips.csv",
        "summary.csv",
        "summary.json",
        "gains.csv",
        "scores.png",
        "side-by-side.mp4",
        "report.html",
    }
    files |= {MARK, LOCK}
    assert {path.name for path in out.iterdir() if path.is_file()} == files
    for mode in MODES:
        names = {f"{prompt}-{seed}.mp4" for prompt, seed in PAIRS}  # VBench's
        assert {path.name for path in (out / "videos" / mode).iterdir()} == names
        assert len(list((out / "clips" / mode).iterdir())) == len(PAIRS)
    assert not list(out.rglob(".partial-*")) + list(out.rglob("*.safetensors"))
    assert iio.imread(next((out / "videos" / "full").iterdir()), plugin="FFMPEG").shape == (8, 32, 32, 3)
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert all(sum(line.startswith(f"| {name} ") for line in tables) == 4 for name in PRINTED)  # three scores, the cost
    assert max(map(len, tables)) <= 80


def test_the_table_has_the_reference_the_noise_floor_and_every_configuration(finished: tuple[Path, str]) -> None:
    clips, summary = rows(finished[0]), rows(finished[0], "summary.csv")
    assert [(c["prompt"], int(c["seed"]), c["mode"]) for c in clips] == [
        (*pair, mode) for pair in PAIRS for mode in MODES
    ]
    assert [each["mode"] for each in summary] == MODES
    by_mode = {each["mode"]: each for each in summary}
    assert by_mode["full"]["psnr"] == "inf"
    assert by_mode["full-other-kernel"]["dense_kernel"] == "math"
    assert 100 < float(by_mode["full-other-kernel"]["psnr"]) < math.inf  # rounding alone
    for mode in MODES[2:]:
        own = [float(clip["psnr"]) for clip in clips if clip["mode"] == mode]
        assert float(by_mode[mode]["psnr"]) == pytest.approx(sum(own) / 4)
        assert float(by_mode[mode]["psnr_low"]) <= float(by_mode[mode]["psnr"]) <= float(by_mode[mode]["psnr_high"])
        assert float(by_mode[mode]["psnr"]) < float(by_mode["full-other-kernel"]["psnr"]) - 20
        assert 0.5 < float(by_mode[mode]["density"]) < 0.6  # half of the blocks, and the text
        assert by_mode[mode]["computed"] == by_mode[mode]["density"]  # no dense steps or layers
        assert (by_mode[mode]["sparsity"], by_mode[mode]["block_size"]) == ("0.5", "32")
    assert all(clip["lpips"] == "" for clip in clips)


def test_the_worst_and_the_gains_are_those_of_the_clips(finished: tuple[Path, str]) -> None:
    out, _ = finished
    clips, summary = rows(out), {each["mode"]: each for each in rows(out, "summary.csv")}
    for mode in MODES[1:]:
        own = [clip for clip in clips if clip["mode"] == mode]
        worst = min(own, key=lambda clip: float(clip["psnr_frame"]))
        assert float(summary[mode]["psnr_worst"]) == min(float(clip["psnr"]) for clip in own)
        assert summary[mode]["psnr_frame_worst"] == worst["psnr_frame"]
        assert (summary[mode]["worst_video"], summary[mode]["worst_frame"]) == (worst["video"], worst["worst_frame"])
        assert float(worst["psnr_frame"]) < float(worst["psnr"])
    psnr = {(clip["prompt"], clip["seed"], clip["mode"]): float(clip["psnr"]) for clip in clips}
    apart = [psnr[prompt, str(seed), "row-50"] - psnr[prompt, str(seed), "none-50"] for prompt, seed in PAIRS]
    told, _ = rows(out, "gains.csv")
    assert (told["mode"], told["against"], told["score"]) == ("row-50", "none-50", "psnr")
    assert float(told["gain"]) == pytest.approx(sum(apart) / 4)
    assert float(told["t_low"]) < float(told["low"]) < float(told["gain"]) < float(told["high"]) < float(told["t_high"])
    assert int(told["wins"]) == sum(each > 0 for each in apart)
    both = json.loads((out / "summary.json").read_text())
    assert both["gains"][0]["gain"] == pytest.approx(float(told["gain"]))
    assert [each["mode"] for each in both["configurations"]] == MODES
    report = (out / "report.html").read_text()
    for text in (
        "The worst clip and the worst frame",
        "Pair by pair against plain sparse by content, 50%",
        f"{float(told['gain']):.2f}",
    ):
        assert text in report
    assert f"{float(summary['row-50']['psnr_frame_worst']):.2f}</td>" in report


def test_the_report_has_all_rows(finished: tuple[Path, str]) -> None:
    out, _ = finished
    report = (out / "report.html").read_text()
    for each in rows(out, "summary.csv"):
        if each["mode"] != "full":
            assert f"{float(each['psnr']):.2f}" in report
    for label in LABELS:
        assert f"<td>{label}</td>" in report
    label_of = dict(zip(MODES, LABELS, strict=True))
    [verdict] = re.findall(r'class="verdict">(.*?)</p>', report)
    nearest = max(rows(out, "summary.csv")[2:], key=lambda each: float(each["psnr"]))
    assert re.search(f"{label_of[nearest['mode']]}.*: PSNR {float(nearest['psnr']):.2f} dB", verdict)
    for clip in rows(out):
        cells = [
            f">{label_of[clip['mode']]}</a>",
            f'<td class="text">{clip["prompt"]}</td>',
            f"{float(clip['flicker']):.4f}",
        ]
        assert all(cell in report for cell in cells)
    assert report.count('<td class="text">') == len(PAIRS) * len(MODES)
    assert "Not computed: --no-lpips" in report


def test_a_finished_folder_is_left_as_it_is_and_only_its_tables_written_again(
    arguments: list[str], finished: tuple[Path, str]
) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "clips").rglob("*.json")}
    table = rows(out)
    (out / "clips.csv").unlink()
    assert evaluate(arguments, out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert rows(out) == table


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--steps", 3], "call.num_inference_steps was 2, now 3"),
        (["--seeds", 1], "seeds was 2, now 1"),
        (["--sparsity", 0.75], "modes was a list of 4, now a list of 6"),
        (["--top-p", 0.5], "modes[2].configs[0].top_p was 0.0, now 0.5"),
        (["--guidance", 2.0], "call.guidance_scale was 1.0, now 2.0"),
    ],
)
def test_changed_settings_are_refused_with_what_differs(
    arguments: list[str], finished: tuple[Path, str], more: list[object], told: str
) -> None:
    result = evaluate(arguments, finished[0], *more)
    assert result.exit_code == 1
    assert told in result.output
    assert "clips in this folder" in result.output
    assert "Use another --out" in result.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--sparsity", 1.5], "sparsity"),
        (["--rectify", "magic"], "rectify"),
        (["--dtype", "int8"], "dtype"),
        (["--prompts", "nowhere.txt"], "no such file"),
        (["--floor-kernel", "default"], "floor_kernel: got 'default'; allowed: one of ['math',"),
        (["--floor-kernel", "fast"], "floor_kernel: got 'fast'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--argument", "height=3"], "--height"),
        (["--top-p", 0.5, "--config", "quarter.yaml"], "no such file"),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(
    arguments: list[str], tmp_path: Path, more: list[object], told: str
) -> None:
    result = evaluate(arguments, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:rectified_spaattn")
def test_blocks_larger_than_the_clip_end_with_what_to_change(arguments: list[str], tmp_path: Path) -> None:
    result = evaluate(arguments, tmp_path / "out", "--block-size", 2048)
    assert result.exit_code == 1
    assert "Use a smaller block_size" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("text", "told"), [("a\n\na\n", "more than once"), ("\n", "no line"), ("a dog", "'dog'")])
def test_bad_prompt_files_are_refused(arguments: list[str], tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    result = evaluate(arguments, tmp_path / "out", "--prompts", tmp_path / "p.txt")
    assert result.exit_code == 2
    assert told in result.output


def test_a_diffusers_pipeline_with_its_preset_and_a_config_file(models: Path, tmp_path: Path) -> None:
    files = {
        "prompts.txt": "a b c",
        "quarter.yaml": "sparsity: 0.75\nblock_size: 16\ndense_layers: [0]\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [
        "--model",
        models / "wan",
        "--prompts",
        tmp_path / "prompts.txt",
        "--argument",
        "max_sequence_length=12",
        "--negative-prompt",
        "d",
    ]
    options += ["--config", tmp_path / "quarter.yaml", "--rectify", "ipar", "--block-size", 16, "--no-neighbours"]
    options += ["--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--dtype", "float32", "--device", "cpu"]
    result = evaluate(["evaluate", *map(str, options)], tmp_path / "out", "--no-lpips")
    assert result.exit_code == 0, result.output
    by_mode = {each["mode"]: each for each in rows(tmp_path / "out", "summary.csv")}
    assert list(by_mode) == ["full", "full-other-kernel", "ipar-75", "quarter"]
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["call"]["guidance_scale"] == 5.0  # the pipeline's own
    assert settings["call"]["negative_prompt"] == "d"
    assert settings["call"]["max_sequence_length"] == 12
    assert settings["modes"][2]["configs"][0]["dense_layers"] == [0, 1]  # of the preset
    computed = {name: float(each["computed"]) for name, each in by_mode.items()}
    density = {name: float(each["density"]) for name, each in by_mode.items()}
    assert computed["ipar-75"] == pytest.approx((2 + density["ipar-75"]) / 3)  # two of three layers run in full
    assert computed["quarter"] == pytest.approx((1 + 2 * density["quarter"]) / 3)


def test_a_model_that_starts_from_an_image(models: Path, tmp_path: Path) -> None:
    picture, prompts = tmp_path / "first.png", tmp_path / "prompts.txt"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(picture)
    prompts.write_text("a b c")
    words = ["evaluate", "--model", models / "ti2v", "--prompts", prompts, "--argument", "max_sequence_length=12"]
    words += ["--height", 64, "--width", 64, "--frames", 5, "--steps", 1, "--dtype", "float32", "--device", "cpu"]
    words += ["--config", models / "sparse.yaml", "--no-lpips"]
    result = command(*words, "--image", picture, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["pipeline"] == "WanImageToVideoPipeline"
    assert settings["call"]["image"] == str(picture)
    assert len(settings["image_sha256"]) == 64
    refused = command(*words, "--image", tmp_path / "gone.png", "--out", tmp_path / "other")
    assert refused.exit_code == 1
    assert "gone.png" in refused.output
    assert not (tmp_path / "other").exists()


def test_lpips_is_never_skipped_in_silence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    quick = [*[each for each in arguments if each != "--no-lpips"], "--seeds", "1", "--steps", "1", "--frames", "2"]
    result = evaluate(quick, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert NO_LPIPS in result.output
    assert NO_LPIPS in (tmp_path / "out" / "report.html").read_text()
    assert NO_LPIPS in json.loads((tmp_path / "out" / "manifest.json").read_text())["lpips"]
    asked = evaluate(quick, tmp_path / "other", "--lpips")
    assert asked.exit_code == 2
    assert NO_LPIPS in asked.output
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "alexnet-owt-7be5be79.pth" in evaluate(quick, tmp_path / "other", "--lpips").output
    with pytest.raises(RuntimeError, match="weights of AlexNet are not at"):
        metrics.Lpips(torch.device("cpu"))


def test_lpips_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics.lpips_weights().parent.mkdir()
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), metrics.lpips_weights())
    lpips = metrics.Lpips(torch.device("cpu"))
    clip = torch.rand(3, 3, 64, 64)
    assert lpips(clip, clip) == 0
    assert lpips(clip, torch.rand(3, 3, 64, 64)) > 0
    with pytest.raises(ValueError, match="--no-lpips"):
        lpips(clip[..., :32], clip[..., :32])


def test_grid_names_say_what_differs() -> None:
    base = (SparseConfig(dense_steps=3), SparseConfig(dense_steps=1))
    grid = {"sparsity": (0.9,), "rectify": ("none", "ipar"), "block_size": (64, 128), "order": ()}
    modes = grid_modes(base, grid, {"top_p": 0.0})
    assert [mode.name for mode in modes] == ["none-90-b64", "none-90-b128", "ipar-90-b64", "ipar-90-b128"]
    assert modes[0].label == "plain sparse by content, 90%, block 64"
    for mode in modes:
        assert [config.dense_steps for config in mode.configs] == [3, 1]
        assert {config.top_p for config in mode.configs} == {0.0}
    check_names([*reference_modes("math"), *modes])
    with pytest.raises(ValueError, match="twice"):
        check_names([*modes, *modes])
    held = grid_modes(base, {"tolerance": (0.05, 0.1), "rectify": ("row",), "block_size": (), "order": ()}, {})
    assert [mode.name for mode in held] == ["row-error-0.05", "row-error-0.1"]
    assert [config.tolerance for mode in held for config in mode.configs] == [0.05, 0.05, 0.1, 0.1]
    check_names(held)
    with pytest.raises(ValueError, match="tolerance: got --sparsity, too"):
        EvaluateOptions(out=Path("runs"), sparsity=(0.8,), tolerance=(0.05,))


def test_neighbours_need_an_order_in_space_in_every_column() -> None:
    base, asked = (SparseConfig(block_size=64, top_p=0.0),), {"neighbours": True}
    names: dict[str, tuple[str, ...]] = {"sparsity": (), "rectify": (), "block_size": ()}
    for order in ((), ("content",), ("gilbert", "content")):
        with pytest.raises(ValueError, match="neighbours: got True with order='content'"):
            grid_modes(base, {**names, "order": order}, asked)
    modes = grid_modes(base, {**names, "order": ("gilbert", "tile")}, asked)
    configs = [mode.config for mode in modes if mode.config is not None]
    assert [(config.order, config.neighbours) for config in configs] == [("gilbert", True), ("tile", True)]


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "two experts.yaml"
    path.write_text("- {sparsity: 0.9}\n- {sparsity: 0.8, rectify: none}\n")
    mode = file_mode(path)
    assert mode.configs == (SparseConfig(sparsity=0.9), SparseConfig(sparsity=0.8, rectify="none"))
    with pytest.raises(ValueError, match="letters, digits"):
        check_names([mode])
    path.write_text("sparsty: 0.9\n")
    with pytest.raises(TypeError, match="sparsty"):
        file_mode(path)
    path.write_text("0.9\n")
    with pytest.raises(TypeError, match="allowed: a mapping"):
        file_mode(path)


def test_configurations_start_from_the_preset_of_the_model(models: Path) -> None:
    source = source_of(ModelOptions(model=str(models / "wan")))
    assert [config.dense_layers for config in work.base_configs(source, tiny.wan_pipeline())] == [(0, 1)]
    options = EvaluateOptions(out=Path("out"), model=str(models / "wan"), height=64)
    assert work.call_arguments(source, options) == {"height": 64}
    call = work.call_defaults(source) | {"height": 64}
    assert (call["height"], call["width"], call["num_frames"], call["num_inference_steps"]) == (64, 832, 81, 50)


def test_a_model_that_is_not_there_is_named(arguments: list[str], tmp_path: Path) -> None:
    nowhere = evaluate(arguments, tmp_path / "out", "--model", "/nowhere/at-all")
    assert "/nowhere/at-all: there is no such folder" in nowhere.output
    result = evaluate(arguments, tmp_path / "out", "--model", tmp_path)
    assert result.exit_code == 1
    assert "without model_index.json" in result.output


def test_the_dense_kernel_is_chosen_inside_and_as_before_outside() -> None:
    q = torch.randn(1, 2, 64, 8)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    default = scaled_dot_product_attention(q, q, q)
    with dense_kernel("math"):
        assert not torch.backends.cuda.flash_sdp_enabled()
        math_out = scaled_dot_product_attention(q, q, q)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before
    torch.testing.assert_close(math_out, default)
    with pytest.raises(ValueError, match="kernel: got 'fast'"):
        Mode(name="a", label="a", kernel="fast")
