"""A tolerance in place of a sparsity: budgets of blocks, the controller, and whole runs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rectified_spaattn as rsa
import tiny
from cases import MODES, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.attention import SparseStats
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.method.select import edge, head_budget, row_budget, top_k_of
from rectified_spaattn.method.tolerance import LOW, highest_top_k, next_top_k

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = TokenLayout.build((4, 6, 7), 3)  # 10 blocks of 16, 8 tokens more
QKV = video_like(5, 2, LAYOUT.sequence, 2, 8)
CONFIG = SparseConfig(block_size=16, sparsity=0.65, top_p=0.0)


# --- budgets of blocks


def called(config: SparseConfig, qkv=QKV, layout=LAYOUT, **options) -> tuple[torch.Tensor, SparseStats]:
    return rectified_attention(*qkv, layout, config, return_stats=True, **options)


def assert_same(one: tuple[torch.Tensor, SparseStats], other: tuple[torch.Tensor, SparseStats]) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1].block_mask, other[1].block_mask)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_constant_budget_is_the_sparsity_bit_for_bit(mode: str, backend: str) -> None:
    for order, top_p in (("content", 0.0), ("tile", 0.4)):
        config = CONFIG.replace(rectify=mode, order=order, top_p=top_p)
        constant = torch.full((2, 2), float(top_k_of(config, 10)))
        assert_same(called(config, backend=backend, top_k=constant), called(config, backend=backend))


@pytest.mark.parametrize("mode", ["ipar", pytest.param("row+slope", marks=pytest.mark.slow)])
def test_kernels_take_budgets(mode: str) -> None:
    pytest.importorskip("triton")
    layout = TokenLayout.build((4, 8, 8))
    qkv = video_like(6, 1, layout.sequence, 2, 64)
    config = SparseConfig(block_size=64, sparsity=0.5, rectify=mode, order="tile", top_p=0.0)
    constant = called(config, qkv, layout, backend="triton", top_k=torch.full((1, 2), 2.0))
    assert_same(constant, called(config, qkv, layout, backend="triton"))
    budgets = torch.tensor([[1.0, 3.0]])
    got, want = (called(config, qkv, layout, backend=name, top_k=budgets)[1] for name in ("triton", "torch"))
    assert torch.equal(got.block_mask, want.block_mask)
    assert got.block_mask.sum((2, 3)).tolist() == [[4, 12]]


@pytest.mark.parametrize("mode", MODES)
def test_every_head_has_its_own_budget(mode: str) -> None:
    """Each as if it were alone; the reference agrees."""
    budgets = torch.tensor([[1.0, 2.75], [5.5, 10.0]])
    config = CONFIG.replace(rectify=mode)
    out, stats = called(config, top_k=budgets)
    exact = called(config, top_k=budgets, token_order=stats.token_order, backend="reference")[1]
    assert torch.equal(stats.block_mask, exact.block_mask)
    for i in range(2):
        for h in range(2):
            alone = [x[i : i + 1, :, h : h + 1] for x in QKV]
            got = called(config, alone, top_k=budgets[i : i + 1, h : h + 1])
            assert torch.equal(got[1].block_mask[0, 0], stats.block_mask[i, h])
            torch.testing.assert_close(got[0][:, :, 0], out[i : i + 1, :, h])
    kept = stats.block_mask.sum((2, 3))
    wanted = head_budget(budgets, 10) if config.rule.choice == "error" else 10 * row_budget(budgets, 10)
    assert torch.equal(kept, wanted)


@given(data=st.data())
def test_the_edge_is_that_of_a_sort(data: st.DataObject) -> None:
    nb = data.draw(st.integers(1, 6))
    values = st.sampled_from((0.0, 1e-30, 0.25, 0.25, 1.0, 3e38, math.inf)) | st.floats(0, 2.0**100, width=32)
    score = torch.tensor(data.draw(st.lists(values, min_size=2 * nb * nb, max_size=2 * nb * nb))).view(1, 2, nb, nb)
    budgets = torch.tensor([data.draw(st.lists(st.integers(1, nb * nb + 2), min_size=2, max_size=2))])
    for dtype in (torch.float32, torch.float64):
        got = edge(score.to(dtype), budgets)
        for h in range(2):
            at = int(budgets[0, h])
            ranked = score[0, h].flatten().sort(descending=True).values.tolist() + [-math.inf] * 3
            assert got[0, h].item() == (ranked[at] if at < nb * nb else -math.inf)
            assert got[0, h].item() == edge(score[:, h : h + 1].to(dtype), at).item()


def test_budgets_out_of_range_keep_what_is_there() -> None:
    odd = torch.tensor([[-3.0, math.nan, 0.2, 1e9, math.inf]])
    assert row_budget(odd, 10).tolist() == [[1, 1, 1, 10, 10]]
    assert head_budget(odd, 10).tolist() == [[10, 10, 10, 100, 100]]


@pytest.mark.parametrize(
    ("top_k", "error", "match"),
    [
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "floating-point"),
        (3.0, TypeError, "float"),
        (torch.ones(2, 3), ValueError, r"allowed: \(2, 2\)"),
        (torch.ones(2, 2, device="meta"), ValueError, "meta"),
    ],
)
def test_wrong_budgets(top_k: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        called(CONFIG, top_k=top_k)


def test_a_tolerance_is_refused_where_nothing_is_learnt() -> None:
    config = CONFIG.replace(tolerance=0.05)
    with pytest.raises(ValueError, match="for a single call"):
        rectified_attention(*QKV, LAYOUT, config)
    with pytest.raises(ValueError, match="for a single call"):
        rsa.plan(*QKV, LAYOUT, config)
    with pytest.raises(ValueError, match="one of them"):
        called(CONFIG, top_k=torch.ones(2, 2), block_mask=torch.ones(2, 2, 10, 10, dtype=torch.bool))
    for wrong, match in (
        ({"tolerance": 0.0}, "above 0"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": 0.1, "probes": 0}, "probes"),
        ({"tolerance": 0.1, "top_p": 1.0}, "top_p"),
        ({"max_density": 0.0}, "above 0"),
        ({"probes": -1}, "probes"),
    ):
        with pytest.raises(ValueError, match=match):
            SparseConfig(**wrong)
    for name, value in (("tolerance", True), ("probes", 1.5), ("max_density", None)):
        with pytest.raises(TypeError, match=name):
            SparseConfig(**{name: value})


def test_files_and_the_command_line_take_it(tmp_path) -> None:
    from rectified_spaattn.lab.clips.options import GenerateOptions

    (tmp_path / "held.yaml").write_text("tolerance: 0.05\nmax_density: 0.25\nprobes: 32\n")
    config = SparseConfig.from_yaml(tmp_path / "held.yaml")
    assert (config.tolerance, config.max_density, config.probe_rows) == (0.05, 0.25, 32)
    assert config.replace(probes=None).probe_rows == 64
    assert SparseConfig().probe_rows == 0
    options = GenerateOptions(model="m", prompt="p", config=(tmp_path / "held.yaml",), tolerance=0.1)
    assert options.configs() == (config.replace(tolerance=0.1),)
    with pytest.raises(ValueError, match="tolerance"):
        GenerateOptions(model="m", prompt="p", tolerance=1.5)


# --- the controller


def settled(tolerance: float, plant, start: float, nb: int, steps: int = 40, max_density: float = 1.0) -> torch.Tensor:
    """Budgets after some steps; plant: errors [1, H] of budgets [1, H]."""
    highest = highest_top_k(max_density, nb)
    top_k = torch.full_like(plant(torch.ones(1, 1)), start)
    for step in range(steps):
        given = {"tolerance": tolerance, "usual": top_k.mean(), "highest": highest, "first": step == 0}
        top_k = next_top_k(top_k, top_k, plant(top_k), **given)
    return top_k


plants = st.tuples(st.lists(st.floats(0.03, 0.9), min_size=1, max_size=4), st.floats(0.3, 1.6)).map(
    lambda drawn: lambda top_k: torch.tensor([drawn[0]]) * top_k ** -drawn[1]
)


@given(plant=plants, tolerance=st.floats(0.005, 0.3), start=st.floats(1, 900))
def test_it_settles_where_the_error_is_just_below_the_tolerance(plant, tolerance: float, start: float) -> None:
    top_k = settled(tolerance, plant, start, 900)
    error = plant(top_k) / (top_k / top_k.mean()).sqrt()  # a head with more blocks may be as much above
    assert ((error <= 1.05 * tolerance) | (top_k >= 900)).all()
    assert ((error >= 0.95 * LOW * tolerance) | (top_k <= 1)).all()
    if ((top_k > 1) & (top_k < 900)).all():
        assert LOW * 0.95 * tolerance < plant(top_k).square().mean().sqrt().item() < 1.05 * tolerance


@given(plant=plants, tolerance=st.floats(0.005, 0.3), ratio=st.floats(0.1, 1), start=st.floats(1, 900))
def test_a_smaller_tolerance_never_keeps_fewer_blocks(plant, tolerance: float, ratio: float, start: float) -> None:
    fewer, more = (settled(t, plant, start, 900, max_density=0.5) for t in (tolerance, ratio * tolerance))
    assert (more >= fewer * (1 - 1e-5)).all()
    assert (more <= 450).all()


def test_six_steps_are_enough_from_a_guess_that_is_four_times_too_small_or_large() -> None:
    def plant(top_k: torch.Tensor) -> torch.Tensor:
        return 0.3 * top_k**-0.7

    right = (0.3 / 0.05) ** (1 / 0.7)
    for start in (right / 4, right * 4):
        error = plant(settled(0.05, plant, start, 900, steps=6))
        assert 0.75 * 0.05 < error.item() < 1.15 * 0.05
        assert not 0.75 * 0.05 < plant(torch.tensor(start)).item() < 1.15 * 0.05  # the guess itself would not do


def test_what_few_rows_measure_is_evened_out() -> None:
    """With a deviation of 0.45 in the logarithm, that of 64 rows, the true error stays around the tolerance."""
    generator = torch.Generator().manual_seed(0)
    top_k, errors = torch.full((1, 200), 100.0), []
    for step in range(60):
        true = 0.3 * top_k**-0.7
        noise = (0.45 * torch.randn(1, 200, generator=generator) - 0.45**2 / 2).exp()
        errors.append(true)
        given = {"tolerance": 0.05, "usual": top_k.mean(), "highest": 900, "first": step == 0}
        top_k = next_top_k(top_k, top_k, true * noise, **given)
    late = torch.cat(errors[10:]) / 0.05
    assert 0.8 < late.median().item() < 1.05
    assert late.quantile(0.95).item() < 1.6


def test_what_it_holds_on_to() -> None:
    kept = torch.tensor([[8.0, 8.0, 8.0, 8.0, 8.0]])
    error = torch.tensor([[math.nan, math.inf, 0.05 * (1 + LOW) / 2, 0.0, 1e9]])
    given = {"tolerance": 0.05, "first": False}
    got = next_top_k(kept, kept, error, usual=kept, highest=20, **given)
    torch.testing.assert_close(got, torch.tensor([[8, 8, 8, 8 / 1.5, 16]]))  # no number, between, as far as a step goes
    floor = next_top_k(kept, 10 * kept, error, usual=kept, highest=200, **given)
    assert floor.tolist() == [[40] * 5]  # top_p keeps 80: it does not wind down out of reach
    meta = kept.to("meta")
    assert next_top_k(meta, meta, meta, usual=meta.mean(), highest=20, **given).is_meta  # nothing is read by the host


# --- whole runs


RUN = {**tiny.SPARSE, "probes": 8, "max_density": 1.0}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.wan_pipeline()


def learnt(handle) -> dict[tuple[int, int, int], torch.Tensor]:
    """(layer, turn, batch) -> budgets."""
    (state,) = handle._watch.states
    return {(place.layer, place.turn, place.batch): x for place, x in state.budgets._learnt.items()}


@pytest.mark.parametrize("mode", ["none", "ipar+gapr", "row", "row+slope"])
def test_a_smaller_tolerance_computes_more_pairs(pipeline, quiet, mode: str) -> None:
    densities = []
    for tolerance in (0.4, 0.2, 0.1):
        with rsa.enable(pipeline, **RUN, rectify=mode, tolerance=tolerance) as handle:
            tiny.run_wan(pipeline, steps=5)
            densities.append(handle.stats().density)
            summary = handle.summary()
        assert f"tolerance {tolerance:g} from sparsity 0.75 on" in summary
        assert "density of a layer under the tolerance: median" in summary
        assert "measured error of a head: median" in summary
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]


def test_each_guidance_call_learns_for_itself_and_a_run_starts_anew(pipeline, quiet) -> None:
    with rsa.enable(pipeline, **RUN, tolerance=0.1) as handle:
        first = tiny.run_wan(pipeline, steps=4)
        before = learnt(handle)
        assert set(before) == {(layer, turn, 1) for layer in range(3) for turn in range(2)}
        assert any(not torch.equal(before[layer, 0, 1], before[layer, 1, 1]) for layer in range(3))
        again = tiny.run_wan(pipeline, steps=4)
        assert torch.equal(first, again)  # a run that knew of the one before would begin with its budgets
        tiny.run_wan(pipeline, steps=4, guidance_scale=1.0)
        assert set(learnt(handle)) == {(layer, 0, 1) for layer in range(3)}
    assert learnt(handle) == {}
    assert handle.stats().probed == 3 * 4 * 2


def test_guidance_in_one_batch_learns_what_two_calls_learn() -> None:
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(batch=2)
    single = [{name: value[i : i + 1] for name, value in inputs.items()} for i in (0, 1)]
    budgets = []
    for calls in ([inputs], single):
        with rsa.enable(model, **RUN, tolerance=0.1) as handle, torch.no_grad():
            for step in range(4):
                handle.set_step(step, 4)
                for each in calls:
                    model(**each)
            of = learnt(handle)
            budgets.append(torch.cat([of[place] for place in sorted(of)]))  # [layers * 2, H]
    torch.testing.assert_close(budgets[0], budgets[1], rtol=1e-4, atol=1e-3)
    assert budgets[0].shape == (6, 2)


def test_it_is_refused_without_a_step() -> None:
    model = tiny.wan_transformer()
    with (
        rsa.enable(model, **RUN, tolerance=0.1),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"tolerance=0.1 needs the denoising step.*no pipeline is enabled.*set_step"),
    ):
        model(**tiny.wan_inputs())


def test_heads_that_cannot_hold_it_are_counted(pipeline, quiet) -> None:
    with rsa.enable(pipeline, **{**RUN, "max_density": 0.25}, tolerance=1e-4) as handle:
        tiny.run_wan(pipeline, steps=3)
        stats = handle.stats()
        assert (stats.unheld, stats.probed) == (36, 36)
        assert "36 of 36 heads of calls kept all that max_density allows" in handle.summary()
        assert all(layer.error > 1e-4 for layer in stats.layers)
    with rsa.enable(pipeline, **RUN, tolerance=0.3) as handle:
        tiny.run_wan(pipeline, steps=3)
        assert handle.stats().layers[0].error_p99 > handle.stats().layers[0].error
        assert handle.stats().unheld == 0


def test_errors_are_told_at_a_fixed_sparsity_too(pipeline, quiet) -> None:
    with rsa.enable(pipeline, **tiny.SPARSE, probes=8) as handle:
        tiny.run_wan(pipeline, steps=2)
        summary = handle.summary()
    assert "measured error of a head: median" in summary
    assert "tolerance" not in summary
    with rsa.enable(pipeline, **tiny.SPARSE) as handle:
        tiny.run_wan(pipeline, steps=2)
        assert "measured error" not in handle.summary()
        assert math.isnan(handle.stats().error)


def test_budgets_and_precisions_change_without_a_recompilation(quiet, fresh_compiler, monkeypatch) -> None:
    pretending = BACKENDS["torch"]._replace(why_not=lambda call: None)  # to have 8 bits, which are as exact then
    monkeypatch.setitem(BACKENDS, "torch", pretending)
    pipeline = tiny.wan_pipeline()
    with rsa.enable(pipeline, **RUN, tolerance=0.1, replan=2, precision="auto") as handle:
        eager, budgets = tiny.run_wan(pipeline, steps=3), learnt(handle)
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        tiny.run_wan(pipeline, steps=1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = tiny.run_wan(pipeline, steps=3)
        assert set(learnt(handle)) == set(budgets)
        (state,) = handle._watch.states
        assert state.plans.taken == 6  # orders are kept, while budgets change
        assert handle.stats().precisions == {"inputs": 6, "fp8": 12}
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
