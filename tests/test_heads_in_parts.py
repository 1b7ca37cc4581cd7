"""Calls for which there is no room run a few heads at a time: less memory, and nothing else."""

import pytest
import torch

from cases import video_like
from rectified_spaattn import SparseConfig, TokenLayout, ops, rectified_attention
from rectified_spaattn.orders import blocks_of

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
LAYOUT = TokenLayout.build((2, 7, 10), 5, False)
HEADS, KEY_HEADS = 4, 2
CASES = {
    "paper, blocks given": {"rectify": "ipar+gapr", "order": "gilbert"},
    "8 bits, order given": {"rectify": "row", "precision": "int8-qk"},
    "default, budgets given": {"order": "gilbert"},
}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_the_heads_give_the_same_bits(case, monkeypatch):
    config = SparseConfig(block_size=64, sparsity=0.5, top_p=0.0, **CASES[case])
    qkv = [x.to(DEVICE) for x in video_like(0, 1, LAYOUT.sequence, HEADS, 64, DTYPE, KEY_HEADS)]
    generator = torch.Generator().manual_seed(0)
    options = {"backend": "triton", "return_stats": True}
    if "blocks" in case:
        options["block_mask"] = (torch.rand(1, HEADS, 2, 2, generator=generator) < 0.7).to(DEVICE)
    if "order" in case:
        tiled = blocks_of(LAYOUT, config).tiled
        orders = [tiled[torch.randperm(128, generator=generator)] for _ in range(KEY_HEADS)]
        options["token_order"] = torch.stack(orders)[None].to(DEVICE)
    if "budgets" in case:
        options["top_k"] = torch.tensor([[1.0, 1.5, 2.0, 1.0]], device=DEVICE)
    whole, stats = rectified_attention(*qkv, LAYOUT, config, **options)
    calls = []
    plan = ops.BACKENDS["triton"].plan
    counted = ops.BACKENDS["triton"]._replace(plan=lambda inputs: (calls.append(inputs.k.shape[2]), plan(inputs))[1])
    monkeypatch.setitem(ops.BACKENDS, "triton", counted)
    monkeypatch.setattr(ops, "SMALL", 0)
    monkeypatch.setattr(ops, "_unused", lambda device: 0)  # on a GPU torch holds what the whole call has used
    monkeypatch.setattr(ops, "_room", lambda device: qkv[0].nbytes + 1.1 * sum(x.nbytes for x in qkv))  # and planning
    parts, parted = rectified_attention(*qkv, LAYOUT, config, **options)
    assert calls == [1, 1]
    if "8 bits" in case:  # the mean that they are less may be summed otherwise
        assert (parts - whole).norm() < 1e-3 * whole.norm()
    else:
        assert torch.equal(parts, whole)
    for field in ("block_mask", "compensated", "probability", "r"):
        assert torch.equal(getattr(parted, field), getattr(stats, field))


@pytest.mark.parametrize(("room", "parts"), [(10.0, 1), (1.3, 1), (1.1, 2), (0.5, 4), (-1.0, 8)])
def test_how_many_parts_there_are(room, parts, monkeypatch):
    """room: over what the call copies and plans, once the output has its own."""
    inputs = ops._inputs(*(torch.zeros(1, 145, 8, 64) for _ in "qkv"), None, None, None, LAYOUT.key,
                         SparseConfig(block_size=64, order="gilbert").key, 1.0, ops.BACKENDS["torch"])  # fmt: skip
    needed = 3 * inputs.q.nbytes + 20 * 8 * 2 * 2
    monkeypatch.setattr(ops, "_room", lambda device: inputs.q.nbytes + room * needed)
    assert ops._parts(inputs) == 1  # a small call does not ask
    monkeypatch.setattr(ops, "SMALL", 0)
    assert min(8, ops._parts(inputs)) == parts
    in_8_bits = inputs._replace(config=inputs.config.replace(precision="fp8"))
    assert min(8, ops._parts(in_8_bits)) >= (2 if room == 1.3 else parts)  # two thirds more
