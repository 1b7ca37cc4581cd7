"""What adapters to engines share, and SGLang's as far as it goes without SGLang; tests/engine_*.py run real engines."""

import importlib
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rectified_spaattn import PRESETS, SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.engines import sglang
from rectified_spaattn.engines.attend import Place, Seam, of_itself, settings
from rectified_spaattn.engines.masks import HIDDEN, Masks, masked
from rectified_spaattn.engines.picture import picture
from rectified_spaattn.engines.record import Record
from test_import import BLOCK, python

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = TokenLayout.build((2, 4, 8), text=6)  # 64 + 6
CONFIG = SparseConfig(sparsity=0.5, top_p=0.0, block_size=16)
VALID = torch.ones(2, 70, dtype=torch.bool)
VALID[0, 67:] = False
VALID[1, 69:] = False
FORMS = {
    "bool, 2-D": VALID,
    "bool, 4-D": VALID[:, None, None],
    "added, 3-D": torch.where(VALID, 0.0, -torch.inf)[:, None],
    "added, half": torch.where(VALID, 0.0, torch.finfo(torch.float16).min).half()[:, None, None],
}


def place(**more):
    return Place(**{"layer": 0, "name": "block 0", "step": 0, "total": 4} | more)


def tensors(batch=2):
    return torch.randn(3, batch, 70, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_every_form_hide_the_same_keys(form):
    layout, text_mask = masked(FORMS[form], LAYOUT, 2)
    assert layout == LAYOUT
    assert torch.equal(text_mask, VALID[:, 64:])


def test_a_mask_that_hides_video_tokens_makes_them_stand_alone():
    valid = VALID.clone()
    valid[1, 5:8] = False
    layout, text_mask = masked(valid, LAYOUT, 2)
    assert layout.text_places.tolist() == [5, 6, 7, *range(64, 70)]
    assert torch.equal(text_mask, valid[:, layout.text_places])
    assert masked(torch.ones(1, 70, dtype=torch.bool), LAYOUT, 2) == (LAYOUT, None)


def test_other_masks_are_named_not_read():
    each_query = torch.zeros(70, 70)
    assert (
        masked(each_query, LAYOUT, 2) == masked(torch.zeros(2, 2, 1, 70), LAYOUT, 2) == "a mask for each query or head"
    )
    assert masked(torch.full((1, 70), HIDDEN / 2), LAYOUT, 2) == "a mask that weighs keys"


def test_a_mask_is_read_once_however_often_a_view_of_it_is_made(monkeypatch):
    reads = []
    monkeypatch.setattr("rectified_spaattn.engines.masks.masked", lambda *given: reads.append(given) or masked(*given))
    masks = Masks()
    first, second = (masks.of(VALID[:, None], LAYOUT, 2) for _ in range(2))
    assert len(reads) == 1
    assert torch.equal(first[1], second[1])
    masks.of(VALID.clone()[:, None], LAYOUT, 2)
    assert len(reads) == 2


def test_a_call_is_the_operators_and_is_noted():
    q, k, v = tensors()
    seam = Seam(config=CONFIG)
    out = seam.attend(q, k, v, LAYOUT, place(), mask=VALID, scale=0.3, masks=Masks())
    expected = rectified_attention(q, k, v, LAYOUT, CONFIG, text_mask=VALID[:, 64:], scale=0.3)
    assert torch.equal(out, expected)
    assert seam.record.sparse == 1
    assert seam.record.backends == {"torch"}


def test_heads_may_share_keys_and_other_calls_are_not_of_self_attention():
    q, k, v = tensors()
    assert of_itself(q, k, v)
    assert of_itself(q, k[:, :, :1], v[:, :, :1])
    shared = Seam(config=CONFIG).attend(q, k[:, :, :1], v[:, :, :1], LAYOUT, place(), masks=Masks())
    assert torch.equal(shared, rectified_attention(q, k[:, :, :1], v[:, :, :1], LAYOUT, CONFIG))
    for other in ((k[:, :64], v[:, :64]), (k[:1], v[:1]), (k[..., :8], v[..., :8]), (k, v[:, :, :1])):
        assert not of_itself(q, *other)
    assert not of_itself(q[:, :, :1], k, v)


def test_a_tolerance_learns_from_step_to_step_and_forgets_with_the_run():
    q, k, v = tensors()
    seam = Seam(config=CONFIG.replace(tolerance=1e-6, max_density=1.0))
    for step in range(4):
        for turn in range(2):  # two guidance calls a step
            assert seam.record.calls("block 0", step) == turn
            assert seam.attend(q, k, v, LAYOUT, place(step=step), masks=Masks()) is not None
    densities = [float(seam.record.cells["block 0", step].density) for step in range(4)]
    assert densities[0] < densities[1] <= densities[3]
    assert len(seam.budgets) == 2
    assert "error of probe rows: median" in seam.record.summary(settings(seam.config))
    assert "tolerance 1e-06" in settings(seam.config)
    seam.begin_run()
    assert (len(seam.budgets), seam.record.sparse) == (0, 0)


def test_plans_live_for_steps_within_a_branch_and_end_with_the_run():
    q, k, v = tensors()
    seam = Seam(config=CONFIG.replace(replan=3))
    for step, branches in enumerate((("text", "no text"), ("text", "no text"), ("no text", "text"), ("text",))):
        for branch in branches:
            for layer in range(2):
                where = place(layer=layer, name=f"block {layer}", step=step, total=6, branch=branch)
                assert seam.attend(q, k, v, LAYOUT, where, masks=Masks()) is not None
    assert (seam.plans.planned, seam.plans.taken) == (10, 4)  # calls in another order plan anew
    assert (len(seam.plans), seam.plans.nbytes) == (6, 6 * 2 * 2 * 64 * 2)  # those of step 0 are too old
    assert "replan 3: orders of 10 calls were kept, 4 calls took them" in seam.summary()
    seam.end_run()
    assert seam.plans.nbytes == 0
    assert "now 0" in seam.summary()
    seam.begin_run()
    assert seam.attend(q, k, v, LAYOUT, place(step=None), masks=Masks()) is not None
    assert "1 calls planned for themselves, because the step is unknown" in seam.summary()


DENSE = {
    "dense_layers": ({"dense_layers": (0,)}, {}, {}),
    "dense_layers, as the layer is unknown": ({"dense_layers": (7,)}, {"layer": None}, {}),
    "dense_steps": ({"dense_steps": 0.25}, {}, {}),
    "dense_steps, as the step is unknown": ({"dense_steps": 1}, {"step": None}, {}),
    "dense_last_steps": ({"dense_last_steps": 1}, {"step": 3}, {}),
    "dense_last_steps, as the step is unknown": ({"dense_last_steps": 1}, {"total": None}, {}),
    "64 tokens that can be tiled, less than one block of 128": ({"block_size": 128}, {}, {}),
    "tolerance, as the layer is unknown": ({"tolerance": 0.1}, {"layer": None}, {}),
    "tolerance, as the step is unknown": ({"tolerance": 0.1}, {"step": None}, {}),
    "a mask for each query or head": ({}, {}, {"mask": torch.zeros(70, 70)}),
    "its dtypes torch.float64, torch.float64 and torch.float64": ({}, {}, {"dtype": torch.float64}),
    "the gradient that it is asked for": ({}, {}, {"gradient": True}),
    "of no known layout": ({}, {}, {"layout": "of no known layout"}),
}


@pytest.mark.parametrize("reason", DENSE)
def test_why_a_call_runs_dense(reason):
    fields, where, call = DENSE[reason]
    q, k, v = (x.to(call.get("dtype", torch.float32)).requires_grad_("gradient" in call) for x in tensors())
    seam = Seam(config=CONFIG.replace(**fields))
    layout = call.get("layout", LAYOUT)
    assert seam.attend(q, k, v, layout, place(**where), mask=call.get("mask"), masks=Masks()) is None
    assert seam.record.dense_reasons == {reason: 1}
    assert reason in seam.record.summary("")


def test_a_summary_tells_of_layers_that_there_are_not_and_of_8_bits():
    q, k, v = tensors()
    seam = Seam(config=CONFIG.replace(dense_layers=(1, 2, 7)))
    assert "NO SUCH LAYER" not in seam.summary()  # before anything ran
    for layer in range(2):
        seam.attend(q, k, v, LAYOUT, place(layer=layer), masks=Masks())
    assert "NO SUCH LAYER: dense_layers [2, 7]; this model has 0 to 1" in seam.summary()
    assert settings(CONFIG.replace(precision="fp8")) == f"{settings(CONFIG)}, precision fp8"


def test_a_record_adds_up_and_is_drawn():
    record = Record()
    assert math.isnan(record.density)
    assert picture(record, record.summary("")).ndim == 3
    for step in range(3):
        record.note_sparse("a", step, SimpleNamespace(device_density=torch.tensor(0.25), backend="triton", probe=None))
        record.note_dense("b", step, "dense_layers")
    record.note_dense("a", 0, "dense_steps")
    record.note_other("cross-attention")
    for calls in (2, 0):
        record.note_forward(calls)
    assert record.density == 0.25
    assert record.table().tolist() == [[0.625, 0.25, 0.25], [1, 1, 1]]
    text = record.summary("settings")
    for line in ("settings", "3 steps, 2 forwards (1 without", "7 self-attention calls", "density 25.0%", "triton"):
        assert line in text
    drawn = picture(record, text)
    assert drawn.dtype.name == "uint8"
    assert len({tuple(pixel) for pixel in drawn.reshape(-1, 3)}) > 3


def test_sglang_takes_fields_and_presets():
    assert sglang.config_of({}, "transformer") == SparseConfig()
    assert sglang.config_of({"sparsity": 0.9}, "transformer").sparsity == 0.9
    experts = PRESETS["wan2.2-t2v-a14b"]
    for name, expected in (("transformer", experts[0]), ("transformer_2", experts[1])):
        assert sglang.config_of({"preset": "wan2.2-t2v-a14b"}, name) == expected
    with pytest.raises(TypeError, match="sparsty"):
        sglang.config_of({"sparsty": 0.9}, "transformer")
    with pytest.raises(ValueError, match="preset"):
        sglang.config_of({"preset": "wan"}, "transformer")


def test_sglang_lays_tokens_out_as_the_call_says(monkeypatch):
    monkeypatch.setattr(sglang, "grid_of", lambda batch: batch)
    grid = ((2, 4, 8), 64)
    for first in (True, False):
        text = sglang.Text(first=6) if first else sglang.Text(last=6)
        assert sglang.layout_of(70, text, grid) == TokenLayout.build((2, 4, 8), 6, text_first=first)
    assert sglang.layout_of(80, sglang.Text(last=6), grid) == TokenLayout.of(80, [(0, 74)])  # references beside it
    assert sglang.layout_of(80, sglang.Text(last=6), (None, 0)) == TokenLayout.of(80, [(0, 74)])
    assert sglang.layout_of(40, sglang.Text(), grid) is None  # audio
    assert "does not say" in sglang.layout_of(70, None, grid)
    assert sglang.layout_of(70, sglang.Text(unknown="why"), grid) == "why"


def test_entry_points_name_what_is_there():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for target in project["entry-points"]["sglang.multimodal_gen.plugins"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_engines_need_torch_alone_to_be_imported():
    got = python(
        BLOCK
        + """
import json
import rectified_spaattn.engines.comfyui, rectified_spaattn.engines.sglang
print(json.dumps({"pillow": "PIL" in sys.modules, "pipelines": "rectified_spaattn.pipelines" in sys.modules}))
"""
    )
    assert got == {"pillow": False, "pipelines": False}
