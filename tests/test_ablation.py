"""What the ablation measures: masses of every mode, intervals, and the pairs it runs on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import attention_error, block_masses
from rectified_spaattn.lab.clips.clip import Mode, Pair, generate
from rectified_spaattn.lab.clips.intervals import bootstrap
from rectified_spaattn.lab.demo_model.model import tokenize
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from rectified_spaattn.lab.pages.clips import score_text
from studies.ablation import FLOOR, Options, Row, ablation
from studies.allocation import allocation, exact
from studies.harness import split_pairs
from studies.pareto import Point, at_time
from studies.rows import read_rows
from study_runs import run_study, table_lines

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 16
IN_SPACE = SparseConfig(sparsity=0.6, top_p=0.0, rectify="ipar", block_size=BLOCK, order="gilbert", neighbours=False)


SMALL = ["--pairs", "2", "--size", "32", "--steps", "4", "--block-size", "32", "--device", "cpu"]


def call(batch: int = 1, head_dim: int = 8) -> AttentionCall:
    """90 video tokens (5 blocks of 16 and 10 left over) and 6 of text; head_dim 4 is fewer columns than blocks."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, 96, 2, head_dim)
    text = torch.arange(6) < torch.tensor([6, 3])[:batch, None]
    layout = TokenLayout.build((2, 5, 9), 6)
    return AttentionCall(q=2 * q, k=k, v=v, text_mask=text, layout=layout, layer=0, name="0", step=0)


@pytest.mark.parametrize("head_dim", [4, 8])
def test_probed_masses_are_those_of_full_attention(head_dim: int) -> None:
    one = call(head_dim=head_dim)
    full = exact(one, IN_SPACE)
    for head in range(2):
        expected = block_masses(one, full.blocks, head)
        torch.testing.assert_close(full.masses[0, :, :, head].mean(1), expected[:, :-1])


@pytest.mark.parametrize("rectify", RECTIFY)
def test_nothing_is_misallocated_where_nothing_is_dropped(rectify: str) -> None:
    config = SparseConfig(sparsity=0.0, rectify=rectify, block_size=BLOCK, order="gilbert", neighbours=True)
    got = allocation(exact(call(batch=2), config), config)
    assert got.relative_error.max() < 1e-5
    assert got.mass_error.max() < 1e-5
    torch.testing.assert_close(got.kept_mass, torch.ones(2))


@pytest.mark.parametrize("rectify", RECTIFY)
def test_errors_are_those_of_the_single_call(rectify: str) -> None:
    both = call(batch=2)
    config = SparseConfig(sparsity=0.6, top_p=0.0, rectify=rectify, block_size=BLOCK, order="gilbert", neighbours=True)
    got = allocation(exact(both, config), config)
    names = ("q", "k", "v", "text_mask")
    for i in range(2):
        alone = AttentionCall(**{**vars(both), **{name: getattr(both, name)[i : i + 1] for name in names}})
        expected = attention_error(alone, config)
        assert got.relative_error[i].item() == pytest.approx(expected.relative_error, rel=1e-4)


def test_mass_errors_follow_from_r_and_the_exact_masses() -> None:
    one = call()
    config = SparseConfig(sparsity=0.6, top_p=0.0, order="gilbert", rectify="ipar", block_size=BLOCK)
    got = allocation(exact(one, config), config)
    stats = attention_error(one, config).stats
    blocks = one.blocks(config)
    true = torch.stack(
        [
            (block_masses(one, blocks, h)[:, :-1] * stats.block_mask[0, h]).sum(1) + block_masses(one, blocks, h)[:, -1]
            for h in range(2)
        ]
    )
    assert got.kept_mass.item() == pytest.approx(true.mean().item(), rel=1e-4)
    assert got.block_mass_error.item() == pytest.approx((stats.r[0] - true).abs().mean().item(), rel=1e-3)
    assert got.mass_error >= got.block_mass_error  # a mean over a block can only lose error
    plain = allocation(exact(one, config), config.replace(rectify="none"))
    assert plain.mass_error.item() == pytest.approx(1 - plain.kept_mass.item(), rel=1e-4)  # it gives the kept ones all


def test_another_layout_than_the_exact_one_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 32"):
        allocation(exact(call(), IN_SPACE), SparseConfig(block_size=32, order="gilbert"))


def test_a_batch_gives_the_clips_of_single_calls() -> None:
    pipe = load_demo_pipeline()
    config = SparseConfig(sparsity=0.5, block_size=32, top_p=0.0, neighbours=False)
    mode = Mode(name="sparse", label="sparse", configs=(config,))
    pairs = [Pair(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS[:2])]
    arguments = {"height": 32, "width": 32, "num_frames": 8, "num_inference_steps": 2}
    together = generate(pipe, mode, pairs, arguments)
    assert [clip.pair for clip in together] == pairs
    for clip, pair in zip(together, pairs, strict=True):
        [alone] = generate(pipe, mode, [pair], arguments)
        torch.testing.assert_close(clip.video, alone.video, atol=1e-3, rtol=0)
    assert not torch.allclose(together[0].video, together[1].video, atol=0.1)


def test_bootstrap_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert found.mean == pytest.approx(sum(values) / 400)
    half = 1.96 * torch.tensor(values).std().item() / 20  # what a normal mean would have
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert math.isnan(bootstrap([1.0]).low)
    some, every = bootstrap([math.inf, 1.0]), bootstrap([math.inf])
    assert (some.mean, score_text(some, "psnr")) == (math.inf, "some identical")
    assert (every.mean, score_text(every, "psnr")) == (math.inf, "identical")
    with pytest.raises(ValueError, match="one or more"):
        bootstrap([])


def test_splits_are_fixed_known_to_the_model_and_disjoint() -> None:
    dev, held_out = split_pairs("dev"), split_pairs("held-out")
    assert (len(set(dev)), len(set(held_out))) == (24, 16)
    assert not {pair.prompt for pair in dev} & {pair.prompt for pair in held_out}
    tokenize([pair.prompt for pair in dev + held_out])  # raises for a word or a length that it does not know
    assert dev == split_pairs("dev")
    last = (
        "a yellow glass sphere comes in from the right behind a cyan metal cylinder, sandy floor, camera orbits right"
    )
    assert dev[-1] == Pair(prompt=last, seed=0)
    with pytest.raises(ValueError, match="dev or held-out"):
        split_pairs("test")


@pytest.mark.slow
def test_the_study_writes_a_row_for_every_pair_and_mode_and_prints_them_again(tmp_path: Path) -> None:
    options = [*SMALL, "--batch", "2", "--sparsity", "0.9", "--rectify", "none", "--rectify", "ipar"]
    printed = run_study(Options, ablation, *options, "--out", str(tmp_path))
    rows, _ = read_rows(tmp_path / "ablation-dev.csv", Row)
    expected = [(mode, pair) for mode in (FLOOR, "none", "ipar") for pair in split_pairs("dev")[:2]]
    assert [(row.rectify, row.pair) for row in rows] == expected
    for plain, ipar in zip(rows[2:4], rows[4:], strict=True):
        assert plain.density == ipar.density  # the same blocks
        assert plain.kept_mass == ipar.kept_mass
        assert plain.mass_error == pytest.approx(1 - plain.kept_mass, rel=1e-3)
        assert ipar.mass_error < plain.mass_error
        assert plain.psnr < 60 < rows[0].psnr
    again = ["--table-of", str(tmp_path / "ablation-dev.csv"), "--plot", str(tmp_path / "plot.png")]
    table = table_lines(run_study(Options, ablation, *again))
    assert len(table) == 2 + 3
    assert table == table_lines(printed)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_masses_of_blocks_by_content() -> None:
    """What the operator makes of the call itself is what is measured on the call with its tokens moved."""
    one = call(batch=2)
    # by error, blocks are chosen from directions of a sample, which moved tokens change
    for mode in [name for name, rule in RECTIFY.items() if rule.choice == "mass"]:
        config = SparseConfig(
            sparsity=0.6, rectify=mode, block_size=BLOCK, order="content", neighbours=False, top_p=0.0
        )
        got = allocation(exact(one, config), config)
        whole = attention_error(one, config)
        assert got.density == pytest.approx(whole.stats.density)
        first = attention_error(sample(one, 0), config).relative_error
        assert got.relative_error[0].item() == pytest.approx(first, rel=1e-4)
        if mode == "none":  # all weight is on what is kept
            assert got.mass_error.tolist() == pytest.approx((1 - got.kept_mass).tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="those of full, 16 in 'content'"):
        allocation(exact(one, config), config.replace(order="gilbert"))


def sample(one: AttentionCall, i: int) -> AttentionCall:
    return replace(one, **{name: getattr(one, name)[i : i + 1] for name in ("q", "k", "v", "text_mask")})


@pytest.mark.slow
def test_orders_are_compared_in_one_run(tmp_path: Path) -> None:
    options = [*SMALL, "--sparsity", "0.8", "--rectify", "row", "--order", "gilbert", "--order", "content"]
    printed = run_study(Options, ablation, *options, "--batch", "2", "--out", str(tmp_path))
    file = tmp_path / "ablation-dev.csv"
    rows, _ = read_rows(file, Row)
    assert [row.order for row in rows] == ["", "", "gilbert", "gilbert", "content", "content"]
    assert rows[2].attention_error != rows[4].attention_error
    again = run_study(Options, ablation, "--table-of", str(file), "--table-of", str(file))
    assert table_lines(again) == table_lines(printed)  # a row that is in two files counts once
    assert "80% attention error: row, " in printed


def test_quality_is_read_off_at_equal_time() -> None:
    pair = Pair(prompt="a prompt", seed=0)
    points = [
        Point(1 - ms / 100, ms, {pair: psnr}, {pair: 0.1}) for ms, psnr in ((10.0, 20.0), (20.0, 24.0), (40.0, 26.0))
    ]
    times = {10.0: 20.0, 15.0: 22.0, 20.0: 24.0, 30.0: 25.0, 40.0: 26.0}
    assert {ms: at_time(points, ms, pair) for ms in times} == times
    assert at_time(points, 9.9, pair) is None  # nothing is read off beyond what was measured
    assert at_time(points, 40.1, pair) is None
