"""Filmed shots: decoded from a wheel, made small, and cut into clips."""

import random
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

pytest.importorskip("imageio_ffmpeg")

from rectified_spaattn.lab.demo_model.model import tokenize
from rectified_spaattn.lab.pages.video import write_frames
from studies.footage.clips import FOLDER, HELD_OUT, SHOTS, Cut, Shot, clip_of, decode, draw_cut, split

LENGTH = 40


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """40 frames of 48 x 32, each of one grey that rises by 6, and a cut to black behind the 30th."""
    greys = np.where(np.arange(LENGTH) < 30, 6 * np.arange(LENGTH), 0).astype(np.uint8)
    frames = np.broadcast_to(greys[:, None, None, None], (LENGTH, 32, 48, 3))
    write_frames(tmp_path / "film.mp4", np.ascontiguousarray(frames), 25)
    with ZipFile(tmp_path / "film.whl", "w") as archive:
        archive.write(tmp_path / "film.mp4", f"{FOLDER}/film.mp4")
    return tmp_path / "film.whl"


def test_shots_are_decoded_between_their_cuts(wheel: Path) -> None:
    shots = {"grey": Shot("film.mp4", 0, 30, "a"), "black": Shot("film.mp4", 30, LENGTH, "a")}
    found = decode(wheel, shots, side=16)
    assert list(found) == ["grey", "black"]
    assert found["grey"].shape == (30, 3, 16, 24)
    greys = found["grey"].float().mean((1, 2, 3))
    torch.testing.assert_close(greys, 6.0 * torch.arange(30), atol=4, rtol=0)
    assert found["black"].max() < 8
    with pytest.raises(KeyError, match=r"other\.mp4"):
        decode(wheel, {"none": Shot("other.mp4", 0, 3, "a")})


def test_a_cut_is_that_square_of_those_frames() -> None:
    shot = torch.zeros(10, 3, 12, 20, dtype=torch.uint8)
    shot += (10 * torch.arange(10)).view(-1, 1, 1, 1).byte() + torch.arange(20).byte()
    cut = Cut(start=8, step=-2, top=2, left=5, side=4, mirrored=True)
    got = (clip_of(shot, cut, frames=3, size=4) + 1) * 127.5
    assert got.shape == (3, 3, 4, 4)
    torch.testing.assert_close(got[0, :, 0], torch.tensor([80.0, 60, 40])[:, None] + torch.tensor([8.0, 7, 6, 5]))


def test_drawn_cuts_stay_inside_and_differ() -> None:
    shot, rng = torch.zeros(33, 3, 12, 20, dtype=torch.uint8), random.Random(0)
    cuts = [draw_cut(rng, shot, frames=16, size=8) for _ in range(300)]
    for cut in cuts:
        assert {cut.start, cut.start + 15 * cut.step} <= set(range(33))
        assert cut.side in range(8, 13)
        assert cut.top in range(12 - cut.side + 1)
        assert cut.left in range(20 - cut.side + 1)
    assert {cut.step for cut in cuts} == {-2, -1, 1, 2}
    assert {cut.mirrored for cut in cuts} == {False, True}


def test_training_never_sees_the_frames_held_out() -> None:
    shot = torch.arange(46)
    assert torch.equal(torch.cat([split(shot, False), split(shot, True)]), shot)
    assert len(split(shot, True)) == HELD_OUT
    assert len(split(shot[:45], True)) == 0


def test_the_demo_model_knows_every_word_of_the_captions() -> None:
    assert len(torch.unique(tokenize([shot.caption for shot in SHOTS.values()]), dim=0)) == len(SHOTS)
