"""Folders with tiny models and finished runs, and the command line run in this process."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from rectified_spaattn.cli.app import app

WIDE = {"COLUMNS": "2000"}
SHORT_TEXT = ["--argument", "max_sequence_length=12"]
WAN = ["--prompt", "a b c", "--height", 128, "--width", 128, "--frames", 9, "--steps", 3, *SHORT_TEXT]


def command(*words: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env=WIDE)


def generate(*words: Any) -> Result:
    return command("generate", *words)


def told(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot for every figure, in tests that look at none: drawing takes longer than all else."""

    def dot(path: Path, *_: Any) -> None:
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr("rectified_spaattn.cli.inspect.maps_figure", dot)
    monkeypatch.setattr("rectified_spaattn.lab.pages.evaluation.scores_figure", dot)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan, wan-2 (two experts), ti2v and hunyuan, each as save_pretrained writes it; sparse.yaml that fits them."""
    import tiny  # here, as every process of pytest reads this file first, and diffusers takes seconds

    folder = tmp_path_factory.mktemp("models")
    wan = tiny.wan_pipeline()
    wan.save_pretrained(folder / "wan")
    wan.register_to_config(expand_timesteps=True)
    wan.save_pretrained(folder / "ti2v")
    tiny.wan_pipeline(experts=2).save_pretrained(folder / "wan-2")
    tiny.hunyuan_pipeline().save_pretrained(folder / "hunyuan")
    (folder / "sparse.yaml").write_text("{sparsity: 0.8, block_size: 16, top_p: 0.0, neighbours: false}\n")
    return folder


PROMPTS = (
    "a red matte sphere rolls right, sandy floor",
    "a blue striped cone stands still, checkered floor",
)
PAIRS = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
MODES = ["full", "full-other-kernel", "none-50", "row-50"]
LABELS = ["full", "full, math kernel (noise floor)", "plain sparse by content, 50%", "row, 50%"]
PRINTED = ["full", "full-other-kernel", "plain sparse by content, 50%", "row, 50%"]  # where there is little room


@pytest.fixture(scope="session")
def arguments(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The evaluation that every test here runs, without its folder."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    options = ["--model", weights, "--prompts", prompts, "--seeds", 2, "--height", 32, "--width", 32, "--frames", 8]
    options += ["--steps", 2]
    options += ["--sparsity", 0.5, "--block-size", 32, "--device", "cpu", "--no-lpips"]
    options += ["--rectify", "none", "--rectify", "row"]
    return ["evaluate", *map(str, options)]


@pytest.fixture(scope="session")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nobody disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = evaluate(arguments, out)
    assert result.exit_code == 0, result.output
    return out, result.output


def evaluate(arguments: list[str], out: Path, *more: object) -> Result:
    return command(*arguments, "--out", out, *more)


def rows(out: Path, name: str = "clips.csv") -> list[dict[str, str]]:
    """The lines of a CSV file without those columns that two runs may differ in."""
    with (out / name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    times = ("seconds", "step_seconds", "speedup", "speedup_low", "speedup_high")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A finished folder of the test's own, whose files keep their times."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
