"""Metrics against values computed by hand and by torchmetrics' classes, and what is measured of attention calls."""

import math

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.clips.clip import (
    Clip,
    Mode,
    Pair,
    check_sparse,
    full_mode,
    generate,
    warm_up,
)
from rectified_spaattn.lab.clips.metrics import flicker, psnr, ssim
from rectified_spaattn.lab.clips.options import ClipError
from rectified_spaattn.lab.clips.summary import measure, plain, summarise, wins
from rectified_spaattn.lab.demo_model.pipeline import DemoVideoPipeline
from rectified_spaattn.lab.pages.demo import comparisons
from rectified_spaattn.pipelines import RunStats

PROMPT = "a red matte sphere rolls right, sandy floor"
CALL = {"height": 32, "width": 32, "num_frames": 8, "num_inference_steps": 3}
SPARSE = SparseConfig.paper(sparsity=0.8, top_p=0.0, block_size=32, neighbours=False)
PLAIN = Mode(name="plain-80", label="plain sparse, 80%", configs=(SPARSE.replace(rectify="none"),))
PAPER = Mode(name="paper-80", label="paper, 80%", configs=(SPARSE,))


pytestmark = pytest.mark.usefixtures("one_thread")


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand() -> None:
    reference = torch.full((2, 4, 3, 16, 16), 0.5)
    video = reference.clone()
    video[0] += 0.1  # squared error 0.01 everywhere
    video[1, :2] += 0.2  # squared error 0.04 in half of the frames
    expected = torch.tensor([20.0, 10 * math.log10(1 / 0.02)])
    torch.testing.assert_close(psnr(video, reference), expected, atol=1e-4, rtol=0)


def test_psnr_of_identical_clips_is_infinite_and_null_in_json() -> None:
    video = clips(1, 2, 3, 16, 16)
    assert psnr(video, video).item() == math.inf
    assert ssim(video, video).item() == pytest.approx(1.0)
    assert plain(math.inf) is None
    assert plain(20.5) == 20.5


def test_metrics_agree_with_the_classes_of_torchmetrics() -> None:
    video, reference = clips(2, 3, 3, 24, 32), clips(2, 3, 3, 24, 32, seed=1)
    for b in range(2):
        peak = PeakSignalNoiseRatio(data_range=1.0)(video[b], reference[b])
        torch.testing.assert_close(psnr(video, reference)[b], peak)
        frames = [
            StructuralSimilarityIndexMeasure(data_range=1.0)(video[b, t : t + 1], reference[b, t : t + 1])
            for t in range(3)
        ]
        torch.testing.assert_close(ssim(video, reference)[b], torch.stack(frames).mean())


def test_ssim_of_a_long_clip_is_the_mean_over_its_frames() -> None:
    video, reference = clips(1, 19, 3, 16, 12), clips(1, 19, 3, 16, 12, seed=1)
    frames = [ssim(video[:, i : i + 1], reference[:, i : i + 1]) for i in range(19)]
    torch.testing.assert_close(ssim(video, reference), torch.stack(frames).mean(0))


def test_ssim_of_two_flat_clips_by_hand() -> None:
    a, b = 0.25, 0.5  # without variance only the term of the means is left
    expected = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    found = ssim(torch.full((1, 1, 3, 16, 16), a), torch.full((1, 1, 3, 16, 16), b))
    assert found.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("video", "reference", "error", "told"),
    [
        (clips(1, 2, 3, 16, 16), clips(1, 2, 3, 16, 20), ValueError, "allowed: reference's"),
        (clips(1, 2, 16, 16, 3), clips(1, 2, 16, 16, 3), ValueError, r"allowed: \[B, T, 3, H, W\]"),
        (clips(1, 2, 3, 16, 16) * 255, clips(1, 2, 3, 16, 16), ValueError, "allowed: 0 to 1"),
        (clips(1, 2, 3, 16, 16) * math.nan, clips(1, 2, 3, 16, 16), ValueError, "allowed: 0 to 1"),
        (clips(1, 2, 3, 16, 16).to(torch.uint8), clips(1, 2, 3, 16, 16), TypeError, "allowed: a floating tensor"),
    ],
)
def test_metrics_refuse_other_input(
    video: torch.Tensor, reference: torch.Tensor, error: type[Exception], told: str
) -> None:
    for metric in (psnr, ssim):
        with pytest.raises(error, match=told):
            metric(video, reference)


def test_ssim_refuses_frames_below_its_window() -> None:
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(clips(1, 1, 3, 8, 16), clips(1, 1, 3, 8, 16))


def test_flicker() -> None:
    video = torch.zeros(2, 3, 3, 16, 16)
    video[1, 1] = 0.5
    assert flicker(video).tolist() == [0, 0.5]
    with pytest.raises(ValueError, match="2 or more"):
        flicker(video[:, :1])


def clip(mode: Mode, pair: Pair, brightness: float, seconds: float) -> Clip:
    video = torch.full((2, 3, 16, 16), brightness)
    return Clip(mode=mode, pair=pair, video=video, seconds=seconds, steps=(seconds / 2, seconds / 2))


def test_scores_means_and_wins_by_hand() -> None:
    first, second = Pair(prompt="a", seed=0), Pair(prompt="a", seed=1)
    made = [
        clip(full_mode(), first, 0.5, 8.0),
        clip(PLAIN, first, 0.6, 4.0),  # 20 dB
        clip(PAPER, first, 0.51, 4.0),  # 40 dB
        clip(full_mode(), second, 0.5, 8.0),
        clip(PLAIN, second, 0.51, 4.0),  # 40 dB
        clip(PAPER, second, 0.6, 4.0),  # 20 dB
    ]
    records = [measure(each, made[0].video, "") for each in made]
    assert [round(each.psnr, 2) for each in records] == [math.inf, 20, 40, math.inf, 40, 20]
    summaries = summarise([full_mode(), PLAIN, PAPER], records)
    full, sparse, _ = summaries
    assert (full.speedup, sparse.speedup, sparse.step_seconds, sparse.clips) == (1.0, 2.0, 2.0, 2)
    assert sparse.scores["psnr"].mean == pytest.approx(30, abs=1e-3)
    assert wins(records, "paper-80", "plain-80", "psnr") == (1, 2)

    [row] = comparisons(summaries, records)
    assert row["psnr_gain"] == pytest.approx(0, abs=1e-3)
    assert (row["against"], row["mode"], row["psnr_won"], row["pairs"]) == ("plain-80", "paper-80", 1, 2)
    assert plain(records[0])["psnr"] is None


def test_a_mode_has_the_same_noise_every_time_and_leaves_the_pipeline_alone(pipe: DemoVideoPipeline) -> None:
    processors = dict(pipe.transformer.attn_processors)
    seen: list[tuple[int, int, float | None]] = []
    runs = [(full_mode(), 3), (PLAIN, 3), (full_mode(), 3), (full_mode(), 4)]
    made = [
        generate(pipe, mode, [Pair(prompt=PROMPT, seed=seed)], CALL, on_step=lambda *step: seen.append(step))[0]
        for mode, seed in runs
    ]
    assert torch.equal(made[0].video, made[2].video)
    assert not torch.equal(made[0].video, made[1].video)
    assert not torch.equal(made[0].video, made[3].video)
    assert seen[:3] == [(step, 3, 1.0) for step in (1, 2, 3)]
    assert [step[2] for step in seen[3:6]] == list(made[1].densities)
    assert made[0].video.shape == (8, 3, 32, 32)
    assert (made[0].density, made[0].backend) == (1.0, "")
    assert (made[1].backend, len(made[1].steps)) == ("torch", 3)
    assert 0.1 < made[1].density < 0.3
    assert sum(made[1].steps) <= made[1].seconds
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())


def test_a_mode_that_runs_no_sparse_call_is_an_error(pipe: DemoVideoPipeline) -> None:
    dense = Mode(name="nothing", label="nothing", configs=(SPARSE.replace(dense_layers=(0, 1)),))
    with pytest.raises(ClipError, match="no attention call ran sparse"):
        warm_up(pipe, [dense], Pair(prompt=PROMPT, seed=0), CALL)
    [made] = generate(pipe, dense, [Pair(prompt=PROMPT, seed=0)], {**CALL, "num_inference_steps": 1})
    assert isinstance(made.stats, RunStats)
    with pytest.raises(ClipError, match="no attention call ran sparse"):
        check_sparse(made)
