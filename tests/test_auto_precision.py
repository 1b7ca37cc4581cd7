"""precision="auto": 8 bits where a run's own probe rows bear them, and nowhere else."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rectified_spaattn as rsa
import tiny
from rectified_spaattn import SparseConfig, TokenLayout, precisions, rectified_attention
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.budgets import Budgets
from rectified_spaattn.kept_plans import KeptPlans, Moment
from rectified_spaattn.precisions import ADDED, ENTER, EVERY, Look, Precisions
from tensors import video_like

pytestmark = [pytest.mark.usefixtures("one_thread"), *([pytest.mark.gpu] if torch.cuda.is_available() else [])]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
LAYOUT = TokenLayout.build((2, 8, 8))  # two blocks of 64
QKV = [x.to(DEVICE) for x in video_like(0, 1, LAYOUT.sequence, 1, 64, DTYPE)]
CONFIG = SparseConfig(
    precision="auto", block_size=64, order="gilbert", sparsity=0.5, rectify="none", top_p=0.0, probes=128
)


def attend(auto: Precisions, step: int | None = 0, qkv=QKV, layout=LAYOUT, config=CONFIG, backend="triton", turn=0):
    moment = Moment(layer=0, branch=None, step=step, total=None)
    out, _, _ = auto.attend(*qkv, layout, config, Budgets(), KeptPlans(), moment, turn=turn, backend=backend)
    return out


@pytest.fixture
def pretending(monkeypatch):
    """The torch backend says that it has 8 bits; it attends as ever. Gives a list of looks that are taken in turn."""
    scripted: list[Look] = []
    row = BACKENDS["torch"]
    monkeypatch.setitem(BACKENDS, "torch", row._replace(why_not=lambda call: None))
    real = precisions._look
    monkeypatch.setattr(precisions, "_look", lambda *a, **k: scripted.pop(0) if scripted else real(*a, **k))
    return scripted


def look(added: float) -> Look:
    return Look(0.1, 0.1 * math.sqrt(1 + added))


def test_kernels_go_to_8_bits_where_inputs_bear_it_and_stay_where_one_channel_is_too_large(monkeypatch) -> None:
    """As the errors of both precisions against float64 say."""
    pytest.importorskip("triton")
    monkeypatch.setattr(precisions, "KINDS", ("int8-qk",))  # the interpreter loses a carry where it rounds to float8
    q, k, v = QKV
    loud = torch.ones(64, dtype=DTYPE, device=DEVICE)
    loud[0] = 1024.0  # of a block of keys all other channels round to nothing in int8; the products are the same
    for qkv, chosen in ((QKV, "int8-qk"), ((q / loud, k * loud, v), "inputs")):
        outs = {
            name: rectified_attention(*qkv, LAYOUT, CONFIG.replace(precision=name), backend="triton")
            for name in ("inputs", "int8-qk")
        }
        exact = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in qkv)).transpose(1, 2)
        in_16, in_8 = (((out - exact).norm() / exact.norm()).item() for out in outs.values())
        assert (in_8**2 < 1.01 * in_16**2, in_8**2 > (1 + ADDED) * in_16**2) == (chosen != "inputs", chosen == "inputs")
        auto = Precisions()
        assert torch.equal(attend(auto, qkv=qkv), outs["inputs"])  # nothing is in 8 bits before it was measured
        ((precision, errors),) = auto.looks
        assert precision == chosen
        assert errors == pytest.approx((in_16, in_8), rel=1e-2)  # every token is a probe row
        assert torch.equal(attend(auto, 1, qkv=qkv), outs[chosen])
        assert auto.calls == ({"inputs": 2} if chosen == "inputs" else {"inputs": 1, chosen: 1})


def test_the_bound_has_hysteresis(pretending) -> None:
    auto = Precisions()
    between = (ENTER + 1) / 2 * ADDED
    told = [between, 0.9 * ENTER * ADDED, between, 1.01 * ADDED, between, math.nan]
    pretending += [look(added) for added in told]
    steps = [EVERY * i for i in range(len(told))]
    for step in steps:
        attend(auto, step, backend="torch")
        attend(auto, step + EVERY - 1, backend="torch")
    assert [precision for precision, _ in auto.looks] == ["inputs", "fp8", "fp8", "inputs", "inputs", "inputs"]
    assert auto.calls == {"inputs": 10, "fp8": 2}


def test_a_decision_is_of_one_guidance_call_one_shape_and_one_time(pretending) -> None:
    auto = Precisions()
    pretending += [look(0.0)] * 5
    turned = TokenLayout.build((8, 8, 2))
    for change in ({}, {"turn": 1}, {"layout": turned}, {"qkv": [x.repeat(2, 1, 1, 1) for x in QKV]}):
        attend(auto, 4, backend="torch", **change)
    assert len(auto) == auto.calls["inputs"] == 4
    attend(auto, 5, backend="torch")
    assert auto.calls["fp8"] == 1
    attend(auto, 3, backend="torch")  # a step back
    assert (auto.calls["fp8"], len(auto.looks)) == (1, 5)


def test_it_stays_in_the_precision_of_the_inputs_where_nobody_can_tell() -> None:
    auto = Precisions()
    attend(auto, None, backend="torch")
    attend(auto, 0, backend="torch")
    assert (auto.calls, auto.looks) == ({"inputs": 2}, [])
    lines = list(auto.lines(CONFIG))
    assert "1 calls stayed in the inputs' precision, because the layer or the step is unknown" in lines[1]
    assert "because torch, which attends here, cannot run precision 'int8-qk', which triton runs" in lines[2]


def test_single_calls_and_no_probe_rows_are_refused() -> None:
    for call in (rectified_attention, rsa.plan):
        with pytest.raises(ValueError, match=r"precision: got 'auto' for a single call.*rsa.enable"):
            call(*QKV, LAYOUT, CONFIG)
    with pytest.raises(ValueError, match="probes: got 0 with precision='auto'"):
        SparseConfig(precision="auto", probes=0)


# --- whole runs

RUN = {**tiny.SPARSE, "precision": "auto"}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.wan_pipeline()


def test_a_backend_without_8_bits_changes_nothing_and_says_so(pipeline, quiet) -> None:
    with rsa.enable(pipeline, **tiny.SPARSE):
        plain = tiny.run_wan(pipeline, steps=2)
    with rsa.enable(pipeline, **RUN) as handle:
        assert torch.equal(tiny.run_wan(pipeline, steps=2), plain)
        assert "precision auto" in repr(handle)
        assert handle.stats().precisions == {"inputs": 12}
        assert handle.stats().probed == 0
        assert "12 calls stayed in the inputs' precision, because torch, which attends here" in handle.summary()


def test_every_layer_and_guidance_call_decides_for_itself_in_every_run(
    pipeline, pretending, monkeypatch, quiet
) -> None:
    monkeypatch.setattr(precisions, "EVERY", 3)
    settings = {**RUN, "replan": 2, "kept_lists": True}
    with rsa.enable(pipeline, **settings) as handle:
        for _ in range(2):  # a run begins with no decision of the one before
            pretending += [look(0.01), look(1.0)] * 3  # in every layer one guidance call bears it
            tiny.run_wan(pipeline, steps=3)
            assert handle.stats().precisions == {"inputs": 6 + 6, "fp8": 6}
            assert not pretending
        summary = handle.summary()
    assert "precision auto: 6 calls in fp8, 12 calls in the inputs' precision" in summary
    assert "3 looks chose fp8, where the error of a call was 0.1000, and 0.1005 in 8 bits" in summary
    assert "3 looks chose the inputs' precision, where the error of a call was 0.1000, and 0.1414 in 8" in summary
    assert "measured error of a head: median" in summary


def test_heads_stay_with_the_rank_that_decided_on_them() -> None:
    with rsa.enable(tiny.wan_transformer(), **RUN) as handle:
        (state,) = handle._watch.states
        state.ranks.add(torch.tensor([[0.1], [0.5]]))
        state._deal_out(tuple(state.layers), torch.ones(3, 2), 1)
        assert state.ranks.imbalance() > 0.1
        assert not state.balanced
        assert all(layer.heads is None for layer in state.layers)


@pytest.mark.parametrize("backend", ["fa4", "torch", "reference"])
def test_8_bits_are_refused_where_the_backend_has_none(backend):
    pipeline = tiny.wan_pipeline()
    with pytest.raises(ValueError, match=f"got precision='fp8' with backend='{backend}'; allowed with it: 'triton'"):
        rsa.enable(pipeline, precision="fp8", backend=backend)
    with rsa.enable(
        pipeline, precision="auto", backend=backend, sparsity=0.5, block_size=16
    ):  # which stays in 16 bits then
        pass
