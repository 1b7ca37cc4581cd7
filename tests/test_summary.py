"""The worst clip and frame, and pairs of configurations: by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.clips.clip import Clip, Mode, Pair, full_mode
from rectified_spaattn.lab.clips.intervals import bootstrap, t_quantile
from rectified_spaattn.lab.clips.summary import ClipRecord, gains, measure, summarise

ONE, TWO, THREE = (Mode(name=name, label=name, configs=(SparseConfig(),)) for name in ("one", "two", "three"))


def record(mode: str, seed: int, psnr: float, lpips: float | None = None) -> ClipRecord:
    scores = {"psnr": psnr, "ssim": psnr / 100, "psnr_frame": psnr - 10, "worst_frame": seed, "ssim_frame": 0.1}
    rest = {"flicker": 0.1, "density": 0.2, "computed": 0.3, "backend": "torch", "seconds": 1.0, "step_seconds": (1.0,)}
    video = f"{mode}-{seed}.mp4"
    return ClipRecord(mode=mode, prompt="a", seed=seed, video=video, lpips=lpips, **scores, **rest)  # type: ignore[arg-type]


def test_an_object_that_dissolves_for_four_frames_is_in_the_worst_frame_and_in_no_mean() -> None:
    """8 of 64 x 64 pixels a side, in 4 of 60 frames: 0.4 dB of the frame's error would be lost in the clip's."""
    reference = torch.full((60, 3, 64, 64), 0.5)
    even = reference + 0.02  # everywhere a little: 34 dB
    dissolved = even.clone()
    dissolved[20:24, :, :8, :8] = 0.0
    clip = Clip(mode=ONE, pair=Pair(prompt="a", seed=0), video=even, seconds=1.0, steps=(1.0,))
    before, after = measure(clip, reference, ""), measure(replace(clip, video=dissolved), reference, "")
    assert before.psnr == pytest.approx(before.psnr_frame, abs=1e-3)
    assert before.psnr - after.psnr < 2.5
    assert before.psnr_frame - after.psnr_frame > 9
    assert after.worst_frame == 20
    assert after.ssim - after.ssim_frame > 0.03
    assert before.ssim - after.ssim < 0.004


def test_the_worst_of_a_mode() -> None:
    records = [record("full", seed, math.inf, 0.0) for seed in (0, 1)]
    records += [record("one", 0, 30.0, 0.02), record("one", 1, 20.0, 0.3)]
    full, one = summarise([full_mode(), ONE], records)
    assert one.worst["psnr"] == 20.0
    assert one.worst["psnr_frame"] == 10.0
    assert one.worst["lpips"] == 0.3
    assert (one.worst["worst_video"], one.worst["worst_frame"]) == ("one-1.mp4", 1)
    assert full.worst["psnr"] == math.inf
    row = one.row()
    assert (row["psnr_worst"], row["psnr_frame_worst"], row["worst_frame"]) == (20.0, 10.0, 1)
    assert row["psnr_t_low"] == pytest.approx(25 - t_quantile(1) * math.sqrt(50 / 2))


def test_configurations_are_compared_pair_by_pair_with_the_first() -> None:
    """The pairs differ by 10 dB, the configurations by 1 and 2 in every one of them: only pairing shows it."""
    records = [record("full", seed, math.inf) for seed in range(3)]
    for mode, more in (("one", (0.0, 0.0, 0.0)), ("two", (1.0, 2.0, 3.0)), ("three", (-1.0, -1.0, 2.0))):
        records += [record(mode, seed, 20.0 + 10 * seed + each) for seed, each in enumerate(more)]
    two, _, three, _ = gains([full_mode(), ONE, TWO, THREE], records)  # psnr and ssim each; no lpips
    assert (two["mode"], two["against"], two["score"], two["wins"], two["pairs"]) == ("two", "one", "psnr", 3, 3)
    assert two["gain"] == pytest.approx(2)
    assert (two["t_low"], two["t_high"]) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert (three["gain"], three["wins"]) == (pytest.approx(0), 1)
    assert gains([full_mode(), ONE], records) == []  # nothing to compare with


def test_a_lower_lpips_is_nearer() -> None:
    records = [record(mode, 0, 20.0, lpips) for mode, lpips in (("full", 0.0), ("one", 0.4), ("two", 0.1))]
    [_, _, found] = gains([full_mode(), ONE, TWO], records)
    assert (found["score"], found["wins"], found["gain"]) == ("lpips", 1, pytest.approx(-0.3))


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (10, 2.228139), (39, 2.022691)]
)
def test_quantiles_of_student_as_tables_have_them(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=1e-6)


def test_the_t_interval_of_many_values_is_the_bootstraps() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = bootstrap(values)
    assert found.t_low == pytest.approx(found.low, abs=0.01)
    assert found.t_high == pytest.approx(found.high, abs=0.01)
    assert math.isnan(bootstrap([1.0]).t_low)
    assert bootstrap([math.inf]).t_high == math.inf


def test_a_speed_up_has_the_spread_of_the_steps_and_an_ideal() -> None:
    full = replace(record("full", 0, math.inf), step_seconds=(8.0,) * 5, computed=1.0)
    one = replace(record("one", 0, 30.0), step_seconds=(1.0, 2.0, 4.0, 8.0, 16.0), computed=0.25)
    reference, sparse = summarise([full_mode(), ONE], [full, one])
    assert (sparse.speedup, sparse.speedup_low, sparse.speedup_high, sparse.ideal) == (2.0, 1.0, 4.0, 4.0)
    assert (reference.speedup_low, reference.speedup_high, reference.ideal) == (1.0, 1.0, 1.0)
    assert {"ideal", "speedup_low", "ours"} <= set(sparse.row())
