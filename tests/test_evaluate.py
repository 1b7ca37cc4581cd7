"""`rectified-spaattn evaluate` on tiny pipelines: what it writes, going on after a kill, several processes, errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner, Result

import tiny
from rectified_spaattn import SparseConfig
from rectified_spaattn.cli.app import app
from rectified_spaattn.cli.evaluate_pipeline import base_configs, call_settings, load_pipeline
from rectified_spaattn.evaluation import perceptual
from rectified_spaattn.evaluation.folder import Folder, write_atomically
from rectified_spaattn.evaluation.metrics import flicker
from rectified_spaattn.evaluation.modes import Grid, check_names, file_mode, grid_modes, reference_modes
from rectified_spaattn.evaluation.paired import Mode, Pair, dense_kernel
from rectified_spaattn.report.video import even, write_clip

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "a red solid circle moving right over a blue striped background",
    "a small blue ringed cross standing still over a green dotted background",
)
PAIRS = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
MODES = ["full", "full-other-kernel", "none-50", "row-50"]
LABELS = ["full attention", "full attention, math kernel (noise floor)", "none, 50%", "row, 50%"]
NO_LPIPS = "torchvision is not installed"


@pytest.fixture(scope="module")
def arguments(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The evaluation that every test here runs, without its folder."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    options = ["--model", weights, "--prompts", prompts, "--seeds", 2, "--height", 32, "--width", 32, "--steps", 2]
    options += ["--sparsity", 0.5, "--block-size", 32, "--device", "cpu", "--no-lpips"]
    return ["evaluate", *map(str, options)]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nobody disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = evaluate(arguments, out)
    assert result.exit_code == 0, result.output
    return out, result.output


def evaluate(arguments: list[str], out: Path, *more: object) -> Result:
    return CliRunner().invoke(app, [*arguments, "--out", str(out), *map(str, more)], env={"COLUMNS": "2000"})


def rows(out: Path, name: str = "clips.csv") -> list[dict[str, str]]:
    """The lines of a CSV file without those columns that two runs may differ in."""
    with (out / name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{k: v for k, v in line.items() if k not in ("seconds", "step_seconds", "speedup")} for line in lines]


def test_every_file_is_there_and_nothing_else(finished: tuple[Path, str]) -> None:
    out, printed = finished
    files = {"manifest.json", "clips.csv", "summary.csv", "scores.png", "side-by-side.mp4", "report.html"}
    assert {path.name for path in out.iterdir() if path.is_file()} == files
    for mode in MODES:
        names = {f"{prompt}-{seed}.mp4" for prompt, seed in PAIRS}  # VBench's
        assert {path.name for path in (out / "videos" / mode).iterdir()} == names
        assert len(list((out / "clips" / mode).iterdir())) == len(PAIRS)
    assert not list(out.rglob(".partial-*")) + list(out.rglob("*.safetensors"))
    assert iio.imread(next((out / "videos" / "full").iterdir()), plugin="FFMPEG").shape == (16, 32, 32, 3)
    assert all(label in printed for label in LABELS)


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


def test_the_report_has_all_rows(finished: tuple[Path, str]) -> None:
    out, _ = finished
    report = (out / "report.html").read_text()
    for each in rows(out, "summary.csv"):
        if each["mode"] != "full":
            assert f"{float(each['psnr']):.2f}" in report
    for label in LABELS:
        assert f"<td>{label}</td>" in report
    for clip in rows(out):
        cells = [f">{clip['mode']}</a>", f'<td class="text">{clip["prompt"]}</td>', f"{float(clip['flicker']):.4f}"]
        assert all(cell in report for cell in cells)
    assert report.count('<td class="text">') == len(PAIRS) * len(MODES)
    assert "Not computed: --no-lpips" in report


# Kills itself where the record of the sixth clip is written but not in its place yet: that is the 15th file, after the
# manifest, two references, six videos and five records.
KILLED = """
import os, signal, sys
from rectified_spaattn import cli

replace, files = os.replace, []

def replace_or_die(*paths):
    files.append(paths)
    if len(files) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = replace_or_die
sys.argv[0] = "rectified-spaattn"
cli.main()
"""


def test_a_killed_run_goes_on_and_loses_nothing(
    arguments: list[str], finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = {path: path.stat().st_mtime_ns for path in out.glob("clips/*/[0-9]*.json")}
    assert len(before) == 5
    assert len(list(out.rglob(".partial-*"))) == 1
    assert len(list(out.glob("references/*.safetensors"))) == 1  # of the second pair; the first is done
    assert not (out / "clips.csv").exists()
    result = evaluate(arguments, out)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert rows(out) == rows(finished[0])
    assert rows(out, "summary.csv") == rows(finished[0], "summary.csv")
    assert not list(out.rglob(".partial-*")) + list(out.rglob("*.safetensors"))


def test_two_processes_give_the_same_table(arguments: list[str], finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "rectified_spaattn"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2
    assert rows(out) == rows(finished[0])


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
        (["--steps", 3], "steps was 2, now 3"),
        (["--seeds", 1], "seeds was 2, now 1"),
        (["--sparsity", 0.75], "modes was a list of 4, now a list of 6"),
        (["--top-p", 0.5], "modes[2].configs[0].top_p was 0.0, now 0.5"),
        (["--guidance", 2.0], "guidance_scale was 1.0, now 2.0"),
    ],
)
def test_changed_settings_are_refused_with_what_differs(
    arguments: list[str], finished: tuple[Path, str], more: list[object], told: str
) -> None:
    result = evaluate(arguments, finished[0], *more)
    assert result.exit_code == 2
    assert told in result.output


def test_a_folder_of_something_else_is_refused(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    result = evaluate(arguments, tmp_path)
    assert result.exit_code == 2
    assert "no manifest.json" in result.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--sparsity", 1.5], "sparsity"),
        (["--rectify", "magic"], "rectify"),
        (["--dtype", "int8"], "dtype"),
        (["--prompts", "nowhere.txt"], "no such file"),
        (["--floor-kernel", "default"], "another one than dense_kernel"),
        (["--dense-kernel", "fast"], "kernel"),
        (["--device", "tpu"], "auto, cpu or cuda"),
        (["--argument", "height=3"], "--height"),
        (["--argument", "magic=3"], "magic"),
        (["--frames", 1], "allowed: 2 or more"),
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


def test_a_diffusers_pipeline_with_its_preset_and_a_config_file(tmp_path: Path) -> None:
    tiny.wan_pipeline().save_pretrained(tmp_path / "wan")
    files = {
        "prompts.txt": "a b c",
        "quarter.yaml": "sparsity: 0.75\nblock_size: 16\ndense_layers: [0]\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [
        "--model",
        tmp_path / "wan",
        "--prompts",
        tmp_path / "prompts.txt",
        "--argument",
        "max_sequence_length=12",
        "--negative-prompt",
        "d",
    ]
    options += ["--config", tmp_path / "quarter.yaml", "--rectify", "ipar", "--block-size", 16, "--no-neighbours"]
    options += ["--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--dtype", "float32", "--device", "cpu"]
    result = evaluate(["evaluate", *map(str, options)], tmp_path / "out", "--floor-kernel", "math", "--no-lpips")
    assert result.exit_code == 0, result.output
    by_mode = {each["mode"]: each for each in rows(tmp_path / "out", "summary.csv")}
    assert list(by_mode) == ["full", "full-other-kernel", "ipar-75", "quarter"]
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["guidance_scale"] == 5.0  # the pipeline's own
    assert settings["arguments"] == {"negative_prompt": "d", "max_sequence_length": 12}
    assert settings["modes"][2]["configs"][0]["dense_layers"] == [0, 1]  # of the preset
    computed = {name: float(each["computed"]) for name, each in by_mode.items()}
    density = {name: float(each["density"]) for name, each in by_mode.items()}
    assert computed["ipar-75"] == pytest.approx((2 + density["ipar-75"]) / 3)  # two of three layers run in full
    assert computed["quarter"] == pytest.approx((1 + 2 * density["quarter"]) / 3)


def test_lpips_is_never_skipped_in_silence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    quick = [*[each for each in arguments if each != "--no-lpips"], "--seeds", "1", "--steps", "1"]
    result = evaluate(quick, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert NO_LPIPS in result.output
    assert NO_LPIPS in (tmp_path / "out" / "report.html").read_text()
    assert NO_LPIPS in json.loads((tmp_path / "out" / "manifest.json").read_text())["lpips"]
    asked = evaluate(quick, tmp_path / "other", "--lpips")
    assert asked.exit_code == 2
    assert NO_LPIPS in asked.output
    monkeypatch.setattr(perceptual, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "alexnet-owt-7be5be79.pth" in evaluate(quick, tmp_path / "other", "--lpips").output
    with pytest.raises(RuntimeError, match="weights of AlexNet are not at"):
        perceptual.Lpips(torch.device("cpu"))


def test_lpips_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    perceptual.lpips_weights().parent.mkdir()
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), perceptual.lpips_weights())
    lpips = perceptual.Lpips(torch.device("cpu"))
    clip = torch.rand(3, 3, 64, 64)
    assert lpips(clip, clip) == 0
    assert lpips(clip, torch.rand(3, 3, 64, 64)) > 0
    with pytest.raises(ValueError, match="--no-lpips"):
        lpips(clip[..., :32], clip[..., :32])


def test_grid_names_say_what_differs() -> None:
    base = (SparseConfig(dense_steps=3), SparseConfig(dense_steps=1))
    grid = Grid(rectify=("none", "ipar"), sparsity=(0.9,), block_size=(64, 128), order=(), overrides={"top_p": 0.0})
    modes = grid_modes(base, grid, "math")
    assert [mode.name for mode in modes] == ["none-90-b64", "none-90-b128", "ipar-90-b64", "ipar-90-b128"]
    assert modes[0].label == "none, 90%, block 64"
    for mode in modes:
        assert mode.config is not None
        assert [config.dense_steps for config in (mode.config, *mode.more)] == [3, 1]
        assert {config.top_p for config in (mode.config, *mode.more)} == {0.0}
        assert mode.kernel == "math"
    check_names([*reference_modes("default", "math"), *modes])
    with pytest.raises(ValueError, match="twice"):
        check_names([*modes, *modes])


def test_neighbours_need_an_order_in_space_in_every_column() -> None:
    base, asked = (SparseConfig(block_size=64, top_p=0.0),), {"neighbours": True}
    for order in ((), ("content",), ("gilbert", "content")):
        with pytest.raises(ValueError, match="neighbours: got True with order='content'"):
            grid_modes(base, Grid(order=order, overrides=asked), "math")
    modes = grid_modes(base, Grid(order=("gilbert", "tile"), overrides=asked), "math")
    configs = [mode.config for mode in modes if mode.config is not None]
    assert [(config.order, config.neighbours) for config in configs] == [("gilbert", True), ("tile", True)]


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "two experts.yaml"
    path.write_text("- {sparsity: 0.9}\n- {sparsity: 0.8, rectify: none}\n")
    mode = file_mode(path, "default")
    assert (mode.config, *mode.more) == (SparseConfig(sparsity=0.9), SparseConfig(sparsity=0.8, rectify="none"))
    with pytest.raises(ValueError, match="letters, digits"):
        check_names([mode])
    path.write_text("sparsty: 0.9\n")
    with pytest.raises(TypeError, match="sparsty"):
        file_mode(path, "default")
    path.write_text("0.9\n")
    with pytest.raises(TypeError, match="allowed: a mapping"):
        file_mode(path, "default")


def test_calls_take_the_pipelines_defaults_and_refuse_what_it_does_not_know() -> None:
    pipe = tiny.wan_pipeline()
    given = {"height": 64, "width": None, "num_frames": None, "steps": None, "guidance_scale": None}
    settings = call_settings(pipe, given, {"negative_prompt": "d"})
    assert (settings.height, settings.width, settings.num_frames, settings.steps) == (64, 832, 81, 50)
    for wrong in ({"negative": "d"}, {"height": 3}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            call_settings(pipe, given, wrong)
    with pytest.raises(TypeError, match="text-to-video"):
        call_settings(object(), given, {})
    assert [config.dense_layers for config in base_configs(pipe)] == [(0, 1)]


def test_a_model_that_is_not_there_is_named(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="/nowhere/at-all: there is no such folder"):
        load_pipeline("/nowhere/at-all", torch.device("cpu"))
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
        Mode(name="a", label="a", config=None, kernel="fast")


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.json", fail)
    assert not (tmp_path / "a.json").exists()
    folder = Folder(tmp_path, ["a"])
    folder.clear_partial()
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_no_file_names_get_one() -> None:
    long = "a cat " * 60
    folder = Folder(Path("out"), ["a/b", "a b", long])
    names = [folder.video("full", Pair(prompt=prompt, seed=0)).name for prompt in ("a/b", "a b", long)]
    assert names[1] == "a b-0.mp4"
    assert len(set(names)) == 3
    assert all(len(name.encode()) < 256 and "/" not in name for name in names)


def test_flicker() -> None:
    video = torch.zeros(2, 3, 3, 16, 16)
    video[1, 1] = 0.5
    assert flicker(video).tolist() == [0, 0.5]
    with pytest.raises(ValueError, match="2 or more"):
        flicker(video[:, :1])


def test_odd_sides_gain_a_pixel(tmp_path: Path) -> None:
    frames = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).view(2, 3, 5, 3).numpy()
    assert even(frames).shape == (2, 4, 6, 3)
    assert (even(frames)[:, :3, :5] == frames).all()
    write_clip(tmp_path / "odd.mp4", torch.rand(2, 3, 17, 33), fps=8)
    assert iio.imread(tmp_path / "odd.mp4").shape == (2, 18, 34, 3)
