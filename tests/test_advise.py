"""`advise`: what it counts, what it scales from, and what it says where it cannot know."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiny
from clip_runs import command
from rectified_spaattn.cli.advise import print_measured
from rectified_spaattn.lab.bench.advice import (
    MEASURED,
    advise,
    expected,
    model_of,
    nominal_density,
    operations,
)
from rectified_spaattn.lab.bench.models import MODELS
from rectified_spaattn.lab.bench.models import tiny as small
from rectified_spaattn.lab.bench.settings import AdviseSettings
from rectified_spaattn.lab.bench.shapes import SHAPES, BenchError

DATA = Path(__file__).parents[1] / "docs" / "data"
PUBLISHED = {  # height, width, frames
    "hunyuan-video": (720, 1280, 128),
    "wan2.1-14b": (720, 1280, 81),
    "wan2.1-14b-i2v": (720, 1280, 81),
    "wan2.2-ti2v-5b": (704, 1280, 121),
    "cogvideox1.5-5b": (768, 1360, 81),
    "flux.1-dev": (4096, 4096, 1),
    "minimax-h3": (768, 1344, None),
    "ltx-2.5": (1088, 1920, 121),
    "kandinsky-6": (512, 768, 121),
    "cosmos-3": (720, 1280, 189),
    "motif-video": (736, 1280, 121),
}


def read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_scaled_from_is_what_was_measured() -> None:
    rows = [row for row in read("op-speed-ours.csv") if (row["shape"], row["precision"]) == (MEASURED.shape, "inputs")]
    stages = [s for s in read("op-stages-ours.csv") if (s["shape"], s["sparsity"]) == (MEASURED.shape, "0.9")]
    dense, *sparse = [row for row in rows if row["sparsity"] in ("", "0.9")]
    shape = SHAPES[MEASURED.shape]
    assert (MEASURED.tokens, MEASURED.heads, MEASURED.head_dim) == (shape.tokens, shape.heads, shape.head_dim)
    assert {row["device"] for row in rows} == {MEASURED.card}
    assert {row["rectify"] for row in sparse} == {MEASURED.rectify}
    assert MEASURED.dense_ms == pytest.approx(float(dense["ms"]), abs=0.01)
    assert {row["name"] for row in sparse} == set(MEASURED.sparse)
    for row in sparse:
        attend = sum(float(s["ms"]) for s in stages if s["backend"] == row["name"] and s["stage"].startswith("attend"))
        of_pairs, of_tokens = MEASURED.sparse[row["name"]]
        assert of_pairs == pytest.approx(attend, abs=0.01)
        assert of_pairs + of_tokens == pytest.approx(float(row["ms"]), abs=0.02)
        assert MEASURED.density == pytest.approx(float(row["density"]), abs=1e-4)
    same = expected(shape, MEASURED.density)
    ratios = {row["name"]: float(row["ratio"]) for row in sparse}
    assert {each.backend: each.ratio for each in same} == pytest.approx(ratios, rel=0.01)


def test_what_is_measured_here_is_a_call_of_the_nominal_density() -> None:
    advice, text = advise(AdviseSettings(model="demo", sparsity=0.75, height=32, width=32)), io.StringIO()
    print_measured(Console(file=text, width=80), advice, torch.device("cpu"))
    dense, ours = [line.split("|")[1:-1] for line in text.getvalue().splitlines() if line.startswith("| ")][1:]
    assert [cell.strip() for cell in dense[:2] + dense[-1:]] == ["dense sdpa", "100.0%", "1.00x"]
    assert float(ours[1].strip(" %")) / 100 == pytest.approx(advice.density, abs=0.002)
    assert re.search(r"Measured here on random numbers: [\d.]+x, of [\d.]+x that the pairs allow", text.getvalue())
    assert nominal_density(advice.config.replace(sparsity=0.0), advice.shape) == 1


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_the_published_sizes(name: str) -> None:
    assert MODELS[name].grid(*PUBLISHED[name]) == MODELS[name].shape.grid
    assert MODELS[name].grid(None, None, None) == MODELS[name].shape.grid
    with pytest.raises(ValueError, match=r"height: got 721; allowed for .*: a multiple of"):
        MODELS[name].grid(721, None, None)


@pytest.mark.parametrize("name", ["hunyuan-video", "wan2.1-14b-i2v", "cogvideox1.5-5b", "ltx-2.5"])
def test_operations_of_two_depths_give_those_of_any(name: str) -> None:
    model = replace(small(MODELS[name]), units=3)
    whole = replace(model, units=1, unit={kind: 3 * count for kind, count in model.unit.items()})
    counted = operations(whole, model.shape.grid)
    assert operations(model, model.shape.grid) == counted
    shape = model.shape
    assert 0 < 4 * model.batch * shape.tokens**2 * shape.heads * shape.head_dim * model.layers < counted


def test_what_cannot_be_counted_is_left_out() -> None:
    result = command("advise", "cosmos-3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "the rest of a forward was not counted" in result.output
    assert "chosen here, not published" in result.output


def test_a_folder_is_read_without_weights(tmp_path: Path) -> None:
    tiny.wan_transformer().save_config(tmp_path / "transformer")
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.9, "transformer_2": ["diffusers", "X"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model, _ = model_of(str(tmp_path))
    assert (model.transformer, model.layers, model.shape.heads) == ("WanTransformer3DModel", 3, 2)
    advice = advise(AdviseSettings(model=str(tmp_path), height=256, width=256, frames=9, block_size=64))
    assert advice.preset == "wan2.2-t2v-a14b"
    assert (advice.shape.grid, advice.blocks, advice.leftover) == ((3, 16, 16), 12, 0)
    assert advice.share is not None
    assert advice.at_best is not None
    assert 0 < advice.share < 1 < advice.at_best < 1 / (1 - advice.share)


def test_the_command_says_what_it_knows_and_what_to_try() -> None:
    result = command("advise", "demo", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for words in (
        "4,128: 16 x 16 x 16 and 32 of text",
        "sparsity 0.8",
        "Few tokens",
        "Extrapolated",
        "nothing was timed",
    ):
        assert words in result.output


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["hunyan-video"], 1, "Did you mean 'hunyuan-video'?"),
        (["wan2.1-14b", "--height", 721], 1, "a multiple of 8"),
        (["wan2.1-14b", "--sparsity", 80], 2, "Did you mean 0.8?"),
        (["wan2.1-14b", "--frames", 4201], 1, "WanTransformer3DModel raises RuntimeError"),
        (["minimax-h3", "--frames", 81], 1, "frames: got 81; allowed for minimax-h3: none"),
        (["demo", "--height", 16, "--width", 16, "--frames", 1], 1, "less than one block of 128"),
    ],
)
def test_what_cannot_be_advised_is_said(words: list[object], code: int, told: str) -> None:
    result = command("advise", *words)
    assert result.exit_code == code
    assert told in " ".join(result.output.split())


def test_another_class_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BenchError, match=r"got a DiTTransformer2DModel; allowed here: \['CogVideoX"):
        model_of(str(tmp_path))
