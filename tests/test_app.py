"""The app without its page: captions, configurations, clips that are kept, what the browser is given."""

import base64
import itertools
import random
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch

import rectified_spaattn as rsa
from clip_runs import command
from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.app import studio as studio_file
from rectified_spaattn.lab.app.choice import (
    NOTHING,
    Choice,
    configs_of,
    plain_configs,
    python_lines,
    same_pairs,
    scene,
)
from rectified_spaattn.lab.app.options import AppOptions
from rectified_spaattn.lab.app.page import head, result_html, style
from rectified_spaattn.lab.app.studio import Studio, figures, studio, video_uri, wall
from rectified_spaattn.lab.demo_model.model import tokenize
from rectified_spaattn.lab.demo_model.words import CAMERAS, COLOURS, FLOORS, MATERIALS, MOTIONS, PAIRED, SHAPES, Solid

BALL, CUBE = Solid("red", "metal", "sphere"), Solid("blue", "striped", "cube")
PROMPT = scene(BALL, "right", "sandy")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(weights: Path) -> Studio:
    """A tiny random model that makes 4 frames in 2 steps."""
    options = AppOptions(model=str(weights), height=32, width=32, frames=4, steps=2, device="cpu")
    return studio(options, torch.device("cpu"))


def quiet(name: str, done: int, total: int) -> None:
    pass


def test_every_scene_that_can_be_chosen_is_a_caption_that_the_model_knows() -> None:
    rng = random.Random(0)
    for motion, second in itertools.product(MOTIONS, (True, False)):
        solid, other = (Solid(rng.choice(COLOURS), rng.choice(MATERIALS), rng.choice(SHAPES)) for _ in range(2))
        chosen = (solid, motion, rng.choice(FLOORS), rng.choice((NOTHING, *CAMERAS)), other if second else None, second)
        if motion in PAIRED and not second:
            with pytest.raises(ValueError, match="a second one"):
                scene(*chosen)
        else:
            assert tokenize(scene(*chosen)).shape == (1, 32)
    assert scene(BALL, "right", "grey", other=CUBE) == (
        "a red metal sphere rolls right in front of a blue striped cube, grey floor"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": " "}, "prompt: got none"),
        ({"mode": "our"}, "Did you mean 'ours'?"),
        ({"tolerance": 0.1}, "one of the two"),
        ({"sparsity": None}, "one of the two"),
        ({"sparsity": None, "tolerance": 0.1, "mode": "paper"}, "with 'ours' alone"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        Choice(**{"prompt": PROMPT, **values})
    assert told in str(error.value)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(prompt=PROMPT, sparsity=0.9),
        Choice(prompt=PROMPT, sparsity=None, tolerance=0.05),
        Choice(prompt=PROMPT, mode="paper"),
    ],
)
def test_the_lines_of_python_do_what_the_page_did(made: Studio, choice: Choice) -> None:
    space: dict[str, Any] = {"pipe": made.pipe}
    exec(python_lines(choice, made.base, False), space)
    try:
        assert tuple(space["handle"].configs().values()) == configs_of(choice, made.base)
    finally:
        rsa.disable(made.pipe)
    preset = rsa.preset("wan2.1-t2v")
    assert "block_size" not in python_lines(choice, preset, True)
    assert configs_of(choice, preset)[0].dense_layers == (0, 1)


def test_plain_sparse_has_the_papers_blocks_and_no_rectification() -> None:
    [plain] = plain_configs(0.9, (SparseConfig(block_size=64, top_p=0.0),))
    assert plain == SparseConfig.paper(sparsity=0.9, block_size=64, top_p=0.0, neighbours=False, rectify="none")
    assert same_pairs(Choice(prompt=PROMPT, sparsity=0.75), 0.3) == 0.75
    assert same_pairs(Choice(prompt=PROMPT, sparsity=None, tolerance=0.1), 0.304) == 0.7


def test_a_slider_makes_nothing_again_that_is_there(made: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = studio_file.generate
    monkeypatch.setattr(
        studio_file, "generate", lambda pipe, mode, *a, **k: ran.append(mode.label) or real(pipe, mode, *a, **k)
    )
    seen: list[tuple[str, int, int]] = []
    first, all_three = made.columns(Choice(prompt=PROMPT, sparsity=0.5), lambda *step: seen.append(step))
    assert [each.name for each in first] == ["full", "ours"]
    assert [each.name for each in all_three] == ["full", "plain sparse", "ours"]
    assert ran == ["full", "ours", "plain sparse"]
    assert seen == [(name, done, 2) for name in ran for done in (1, 2)]
    assert len(list(made.columns(Choice(prompt=PROMPT, sparsity=0.75), quiet))) == 2
    assert ran[3:] == ["ours", "plain sparse"]
    list(made.columns(Choice(prompt=PROMPT, sparsity=0.75, mode="paper"), quiet))
    assert ran[5:] == ["paper"]
    list(made.columns(Choice(prompt=PROMPT, sparsity=0.5), quiet))
    assert ran[6:] == []
    list(made.columns(Choice(prompt=PROMPT, seed=1), quiet))
    assert ran[6:] == ["full", "ours", "plain sparse"]
    monkeypatch.setattr(studio_file, "_KEPT", 2)
    list(made.columns(Choice(prompt=PROMPT, seed=2), quiet))
    assert len(made.clips) == 2


def test_the_browser_gets_clips_differences_and_figures(made: Studio) -> None:
    *_, columns = made.columns(Choice(prompt=PROMPT, sparsity=0.5), quiet)
    frames = wall(columns, 64)
    assert frames.shape == (4, 2 * 64, 3 * 64, 3)
    full, plain = frames[:, 64:, :64], frames[:, 64:, 64:128]
    assert bool((full == 255).all())
    assert bool((plain < 255).any())
    shown = [figures(each) for each in columns]
    assert shown[0]["psnr"] == "reference"
    assert shown[2]["psnr"] == f"{columns[2].psnr:.2f} dB"
    assert shown[2]["pairs"] == f"{columns[2].clip.computed:.1%}"
    html = result_html(columns, made.fps)
    kind, _, data = html.partition('src="data:')[2].partition('"')[0].partition(";base64,")
    assert kind == "video/mp4"
    assert iio.imread(base64.b64decode(data), extension=".mp4").shape == (4, 2 * 384, 3 * 384, 3)
    assert html.count("<canvas") == 7
    assert "customElements.define" in head()
    assert "clip-wall" in style()
    assert video_uri(frames[:1], 8).startswith("data:image/png;base64,")


def test_the_page_is_built_with_the_words_of_the_demo_model_or_a_prompt(made: Studio) -> None:
    pytest.importorskip("gradio")
    from rectified_spaattn.lab.app.blocks import build

    labels = {getattr(each, "label", None) for each in build(made).blocks.values()}
    assert {"colour", "material", "shape", "what it does", "seed", "third column"} <= labels


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", 70000], "1 to 65535"),
        (["--prompt", "x"], "Choose its words on the page"),
        (["--steps", 0], "1 or more"),
    ],
)
def test_bad_options_are_refused(words: list[object], told: str) -> None:
    result = command("app", *words)
    assert result.exit_code == 2
    assert told in result.output
