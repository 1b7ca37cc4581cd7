"""Videos, figures and the report: what is written is what was measured."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from attention_calls import smooth_call
from rectified_spaattn import SparseConfig
from rectified_spaattn.config import ORDERS, RECTIFY
from rectified_spaattn.lab.calls.maps import HeadResult, HeadStudy
from rectified_spaattn.lab.clips.folder import Folder
from rectified_spaattn.lab.pages import figures, styles
from rectified_spaattn.lab.pages.clips import strip
from rectified_spaattn.lab.pages.demo import write_report
from rectified_spaattn.lab.pages.html import data_uri, decibel, percent
from rectified_spaattn.lab.pages.video import (
    Row,
    check_encoder,
    difference,
    enlarge,
    even,
    labelled_grid,
    read_mp4,
    write_clip,
    write_frames,
)
from studies.curve_figure import curve_figure, mean_distance

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def flat_clip(red: float, frames: int = 5, side: int = 16) -> torch.Tensor:
    clip = torch.zeros(frames, 3, side, side)
    clip[:, 0] = red
    return clip


def test_enlarge_repeats_pixels_for_whole_factors() -> None:
    clip = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = enlarge(clip, 24)
    assert large.shape == (2, 24, 24, 3)
    expected = (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(large[:, 1::3, 1::3], expected)
    assert enlarge(clip, 20).shape == (2, 20, 20, 3)
    assert enlarge(torch.zeros(1, 3, 8, 16), 32).shape == (1, 16, 32, 3)


def test_difference_is_white_where_clips_agree() -> None:
    away = difference(flat_clip(0.3), flat_clip(0.0), gain=2.0)
    torch.testing.assert_close(away, torch.full((5, 3, 16, 16), 1 - 2 * 0.3 / 3))
    assert difference(flat_clip(0.3), flat_clip(0.3), gain=4.0).min() == 1


def test_grid_puts_every_clip_in_its_cell_and_survives_the_video(tmp_path: Path) -> None:
    levels = [[0.2, 0.4, 0.6], [0.8, 1.0, 0.0]]
    rows = [Row(caption=f"row {i}", clips=[flat_clip(level) for level in row]) for i, row in enumerate(levels)]
    grid = labelled_grid(["a\n1", "b\n2", "c\n3"], rows, cell=64)
    assert grid.dtype == np.uint8
    assert len(grid) == 5
    assert grid.shape[1] % 2 == grid.shape[2] % 2 == 0
    assert 3 * 64 < grid.shape[2] < 3 * 64 + 40

    path = tmp_path / "grid.mp4"
    write_frames(path, grid)
    read = iio.imread(path)
    assert read.shape == grid.shape
    assert iio.immeta(path)["codec"] == "h264"
    for frames, tolerance in ((grid, 0), (read, 12)):
        cell_rows = [row for row in range(grid.shape[1]) if abs(int(frames[2, row, 40, 1]) - 0) <= tolerance]
        first, last = cell_rows[8], cell_rows[-8]  # inside the cells of the first and of the last row
        centres = [6 + 32 + x * 70 for x in range(3)]
        for y, row in ((first, levels[0]), (last, levels[1])):
            reds = [int(frames[2, y, x, 0]) for x in centres]
            assert reds == pytest.approx([255 * level for level in row], abs=tolerance + 1)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        ([], []),
        (["a", "b"], [Row(caption="r", clips=[flat_clip(1)])]),
        (["a"], [Row(caption="r", clips=[None])]),
        (["a", "b"], [Row(caption="r", clips=[flat_clip(1, frames=2), flat_clip(1, frames=3)])]),
    ],
)
def test_grid_refuses_what_does_not_fit(columns: list[str], rows: list[Row]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        labelled_grid(columns, rows)


def test_mp4_refuses_floats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_frames(tmp_path / "x.mp4", np.zeros((2, 16, 16, 3)))


def test_odd_sides_gain_a_pixel(tmp_path: Path) -> None:
    frames = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).view(2, 3, 5, 3).numpy()
    assert even(frames).shape == (2, 4, 6, 3)
    assert (even(frames)[:, :3, :5] == frames).all()
    write_clip(tmp_path / "odd.mp4", torch.rand(2, 3, 17, 33), fps=8)
    assert iio.imread(tmp_path / "odd.mp4").shape == (2, 18, 34, 3)
    write_clip(tmp_path / "wide.mp4", torch.rand(2, 3, 16, 32), fps=8, width=64)
    assert iio.imread(tmp_path / "wide.mp4").shape == (2, 32, 64, 3)


# Encoders that fail: killed, a full disk that it reports, a file that lacks frames, and none.
FAILING = {
    "killed": "kill -9 $$",
    "fails": 'echo "No space left on device" >&2; exit 1',
    "truncates": 'set -- "${@:1:$#-1}" -frames:v 1 "${@: -1}"; exec {ffmpeg} "$@"',
    "writes nothing": "exit 0",
    "writes rubbish": 'for last; do :; done; echo rubbish > "$last"',
}


@pytest.mark.parametrize("how", FAILING)
def test_a_video_that_is_not_whole_is_an_error_and_leaves_what_was_there(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = imageio_ffmpeg.get_ffmpeg_exe()
    encoder, path = tmp_path / "encoder", tmp_path / "videos" / "v.mp4"
    script = FAILING[how].replace("{ffmpeg}", real)
    encoder.write_text(f"#!/bin/bash\n{script}\n")
    encoder.chmod(0o755)
    path.parent.mkdir()
    path.write_text("before")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(encoder))
    with pytest.raises(OSError, match=re.escape(str(path))):
        write_frames(path, np.zeros((5, 16, 16, 3), dtype=np.uint8))
    if how != "truncates":  # the only frame of what is tried is written
        with pytest.raises(OSError, match="No mp4 can be written here"):
            check_encoder()
    assert path.read_text() == "before"
    assert [each.name for each in path.parent.iterdir()] == ["v.mp4"]


def test_a_video_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_text("no video")
    with pytest.raises(OSError, match=r"v\.mp4: got a file that is no video"):
        read_mp4(tmp_path / "v.mp4")


def test_curve_figure_measures_how_compact_blocks_are(tmp_path: Path) -> None:
    spread = curve_figure(tmp_path / "curve.png", grid=(4, 4, 4), block_size=16)
    points = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))  # a slice of one frame
    by_hand = torch.nn.functional.pdist(points).mean().item()
    assert spread["raster"] == pytest.approx(by_hand, rel=1e-5)
    assert spread["gilbert"] < spread["raster"]
    assert mean_distance((4, 4, 4), 16, "tile") <= spread["raster"]
    assert Image.open(tmp_path / "curve.png").width > 800


def test_shares_of_blocks_and_mass_by_hand() -> None:
    full = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.5, 0.1], [0.1, 0.1, 0.7, 0.1]])
    critical = torch.tensor([[True, False, False], [False, False, True], [False, False, True]])
    compensated = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    scores = dict.fromkeys(("relative_error", "density", "kept_mass", "mass_error", "r_error", "misplaced"), 0.0)
    maps = {"masses": full, "probability": full, "block_mask": critical, "compensated_mask": compensated}
    result = HeadResult(sparsity=0.8, rectify="ipar", compensated=0.4, **scores, **maps)
    blocks = smooth_call().blocks(SparseConfig())
    study = HeadStudy(call=smooth_call(), order="content", blocks=blocks, full=full, results={})
    shares = study.shares(result)
    assert shares["correlation"] == pytest.approx(1)
    assert shares["critical_blocks"] == pytest.approx(1 / 3)
    assert shares["critical_mass"] == pytest.approx((0.4 + 0.5 + 0.7) / 3)
    assert shares["compensated_mass"] == pytest.approx((0.3 + 0.2) / 3)
    assert shares["rejected_mass"] == pytest.approx((0.2 + 0.2 + 0.2) / 3)
    assert shares["text_mass"] == pytest.approx(0.1)
    assert result.scores() == {"sparsity": 0.8, "rectify": "ipar", "compensated": 0.4, **scores}


def test_error_figure_is_drawn(tmp_path: Path) -> None:
    row = {"sparsity": 0.8, "mean": 0.15, "by_layer": [0.1, 0.2]}
    rows = [row | {"rectify": mode, "order": style.order} for mode, style in styles.STYLES.items()]
    figures.error_figure(tmp_path / "error.png", rows)
    assert Image.open(tmp_path / "error.png").width > 800


def test_every_mode_and_order_has_one_name_and_one_look() -> None:
    assert set(styles.STYLES) == set(RECTIFY)
    assert set(styles.LINES) == set(ORDERS)
    assert len({styles.colour(mode) for mode in (*RECTIFY, "a study's")}) == len(RECTIFY) + 1
    named = [SparseConfig.paper(rectify="none"), SparseConfig.paper(), SparseConfig()]
    assert [styles.label_of(each) for each in named] == ["plain sparse, 80%", "paper, 80%", "ours, 80%"]
    assert styles.label("query+slope", "gilbert") == "ours in space"
    assert styles.label_of(SparseConfig(tolerance=0.05)) == "ours, error 0.05"
    assert [styles.is_ours(each) for each in (*named, None)] == [False, False, True, False]


class _Page(HTMLParser):
    """Text of a page, and everything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset")]
        self.loads += re.findall(r"url\((.*?)\)", dict(attrs).get("style") or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def metrics() -> dict[str, Any]:
    config = {
        "sparsity": 0.8, "top_p": 0.0, "rectify": "ipar+gapr", "block_size": 64, "order": "gilbert",
        "neighbours": False, "first_frame": False, "dense_steps": 0, "dense_layers": [],
    }  # fmt: skip

    plain = {**config, "rectify": "none"}

    def clip(mode: str, seed: int, psnr: float | None, ssim: float, seconds: float) -> dict[str, Any]:
        return {
            "mode": mode, "prompt": "a <b>red</b> circle", "seed": seed, "psnr": psnr, "ssim": ssim,
            "density": 0.1963, "seconds": seconds, "backend": "torch",
        }  # fmt: skip

    def mean(mode: str, label: str, psnr: float | None, ssim: float, seconds: float) -> dict[str, Any]:
        return {
            "mode": mode, "label": label, "clips": 2, "psnr": psnr, "ssim": ssim, "density": 0.1963,
            "seconds": seconds, "step_seconds": seconds / 12, "speedup": 9.5 / seconds, "backend": "torch",
            "speedup_low": 9 / seconds, "speedup_high": 10 / seconds, "ideal": 1 / 0.1963,
            "ours": mode == "ours-80", "sparsity": 0.8,
        }  # fmt: skip

    return {
        "verdict": "ours, 80%: a sentence",
        "command": "rectified-spaattn demo --prompts 2",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"rectified-spaattn": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1"},
        "device": {"type": "cpu", "name": "Some CPU", "threads": 2, "load_average": 0.37},
        "load_average_after": 2.91,
        "settings": {
            "call": {
                "height": 64, "width": 64, "num_frames": 16, "num_inference_steps": 12, "guidance_scale": 1.0
            },
            "dtype": "float32", "prompts": ["a <b>red</b> circle"], "seeds": 2,
        },
        "modes": [
            {"name": "full", "label": "full", "ours": False, "configs": []},
            {"name": "plain-80", "label": "plain sparse, 80%", "ours": False, "configs": [plain]},
            {"name": "ours-80", "label": "ours, 80%", "ours": True, "configs": [config]},
        ],
        "means": [
            mean("full", "full", None, 1.0, 9.51), mean("plain-80", "plain sparse, 80%", 21.345, 0.87654, 6.07),
            mean("ours-80", "ours, 80%", 24.5678, 0.91234, 1.54),
        ],
        "comparisons": [
            {
                "sparsity": 0.8, "against": "plain-80", "mode": "ours-80", "psnr_gain": 3.2228,
                "ssim_gain": -0.0358, "psnr_won": 2, "ssim_won": 1, "pairs": 2,
            }
        ],
        "clips": [
            clip("full", 0, None, 1.0, 9.11), clip("plain-80", 0, 20.777, 0.85111, 6.22),
            clip("ours-80", 0, 23.123, 0.90777, 6.33), clip("ours-80", 1, None, 1.0, 6.44),
        ],
        "attention": {
            "step": 6, "layers": ["a"], "relative_error": [],
            "shown": {
                "layer": 0, "head": 1, "sparsity": 0.8, "text_mass": 0.0345,
                "misplaced": {"plain": 0.456, "ours": 0.123},
            },
        },
        "speed": [
            {"mode": mode, "label": mode, "size": 96, "density": density, "step_seconds": seconds, "speedup": speedup}
            for mode, density, seconds, speedup in (("full", 1.0, 3.219, 1.0), ("ours-80", 0.2, 1.411, 2.28))
        ],
        "seconds_total": 123.4,
    }  # fmt: skip


@pytest.fixture
def page(metrics: dict[str, Any], tmp_path: Path) -> _Page:
    (tmp_path / "figures").mkdir()
    for name in ("maps", "error"):
        Image.new("RGB", (4, 4)).save(tmp_path / "figures" / f"{name}.png")
    cells = [
        {"label": each["label"], "ours": each["ours"], "clip": strip(flat_clip(0.5), 16, 16)}
        for each in metrics["means"]
    ]
    cells = [{**each, "away": None if each["label"] == "full" else each["clip"]} for each in reversed(cells)]
    level = metrics["means"][2] | cells[0]
    players = {"rows": [{"caption": "a pair", "cells": cells}], "levels": [level, level]}
    report = write_report(Folder(tmp_path, [], {}), metrics, players)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    parsed = _Page()
    parsed.feed(report.read_text())
    return parsed


def test_report_holds_every_number(page: _Page, metrics: dict[str, Any]) -> None:
    text = " ".join("".join(page.text).split("metrics.json")[0].split())  # without the copy of the file at the end
    for row in metrics["means"] + metrics["clips"]:
        if row["mode"] != "full":
            assert decibel(row["psnr"]) in text
            assert f"{row['ssim']:.4f}" in text
        assert f"{row['seconds']:.2f}" in text
        assert percent(row["density"]) in text
    for row in metrics["means"] + metrics["speed"]:
        assert f"{row['step_seconds']:.3f}" in text
        assert f"{row['speedup'] if row.get('label') != 'full' else 1:.2f}×" in text
    assert f"{9 / 6.07:.2f} to {10 / 6.07:.2f}" in text
    assert text.count("above 5.09×") == 1  # 9.5 / 1.54, of 19.63% of the pairs
    assert text.index("ours, 80%: a sentence") < text.index("Drag across the clip")
    for fact in (
        "gains 3.22 dB",
        "closer in 2 of 2 pairs",
        "loses 0.0358",
        "closer in 1 of 2.",
        "3.5%",
        "45.6%",
        "12.3%",
        "123 s in all",
    ):
        assert fact in text
    for value in (
        *metrics["versions"].values(),
        metrics["command"],
        metrics["created"],
        "Some CPU",
        "0.37",
        "2.91",
        "0, 1",
    ):
        assert value in text


def test_report_ends_with_metrics_json_and_escapes_prompts(page: _Page, metrics: dict[str, Any]) -> None:
    raw = re.search(r"metrics\.json(\{.*\})", "".join(page.text), re.DOTALL)
    assert raw is not None
    assert json.loads(raw[1]) == metrics
    assert "a <b>red</b> circle" in "".join(page.text)  # as text, which the parser gives back unescaped


def test_report_loads_nothing_from_outside(page: _Page) -> None:
    assert len(page.loads) == 2 + 2 + 5 + 4  # figures, the wipe, a row with differences, two levels
    assert all(value.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for value in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "viewport" not in page.text
    assert "url(" not in "".join(page.text)


def test_data_uri_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"allowed: \.png, \.mp4"):
        data_uri(tmp_path / "x.svg")


def test_a_strip_holds_every_frame_in_its_place() -> None:
    clip = torch.stack([flat_clip(level, frames=1)[0] for level in (0.0, 0.5, 1.0)])
    picture = Image.open(io.BytesIO(base64.b64decode(strip(clip, 8, 8).split(",")[1]))).convert("RGB")
    assert picture.size == (24, 8)
    assert [picture.getpixel((x, 4))[0] for x in (4, 12, 20)] == pytest.approx([0, 128, 255], abs=12)  # type: ignore[index]
