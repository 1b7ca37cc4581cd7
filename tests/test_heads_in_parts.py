"""Large calls run a few heads at a time: less memory, and nothing else."""

import pytest
import torch

from cases import video_like
from rectified_spaattn import SparseConfig, TokenLayout, ops, rectified_attention

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
        orders = torch.stack([torch.randperm(140, generator=generator)[:128] for _ in range(KEY_HEADS)])
        options["token_order"] = orders[None].to(DEVICE)
    if "budgets" in case:
        options["top_k"] = torch.tensor([[1.0, 1.5, 2.0, 1.0]], device=DEVICE)
    whole, stats = rectified_attention(*qkv, LAYOUT, config, **options)
    calls = []
    plan = ops.BACKENDS["triton"].plan
    counted = ops.BACKENDS["triton"]._replace(plan=lambda inputs: (calls.append(inputs.k.shape[2]), plan(inputs))[1])
    monkeypatch.setitem(ops.BACKENDS, "triton", counted)
    monkeypatch.setattr(ops, "COPIES_AT_ONCE", sum(x.nbytes for x in qkv) // 2 + 1)
    parts, parted = rectified_attention(*qkv, LAYOUT, config, **options)
    assert calls == [1, 1]
    assert torch.equal(parts, whole)
    for field in ("block_mask", "compensated", "probability", "r"):
        assert torch.equal(getattr(parted, field), getattr(stats, field))
