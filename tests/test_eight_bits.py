"""Listed blocks in 8 bits, against what quantising the same tensors costs in float64."""

import math

import pytest
import torch

from cases import kernel_budget, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.backends.calls import Call
from rectified_spaattn.orders import blocks_of

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16

# grid, text, block size, head_dim, heads, key heads
CASES = {
    "plain": ((2, 8, 12), 40, 64, 64, 2, 2),
    "ragged, grouped": ((2, 7, 11), 17, 64, 64, 2, 1),
    "96": ((2, 7, 11), 17, 64, 96, 1, 1),
    "128": ((4, 8, 12), 5, 128, 128, 1, 1),
}
PRECISIONS = ("int8-qk", "fp8")
# Triton's interpreter loses the carry where a float8 is rounded up to a power of two: how exact they are a GPU tells
EXACT = PRECISIONS if DEVICE.type == "cuda" else PRECISIONS[:1]


def call(case, precision="inputs", **settings):
    grid, text, block_size, head_dim, heads, key_heads = CASES[case]
    layout = TokenLayout.build(grid, text, False)
    config = SparseConfig(
        **{
            "block_size": block_size,
            "order": "gilbert",
            "sparsity": 0.5,
            "rectify": "none",
            "precision": precision,
            **settings,
        }
    )
    qkv = [x.to(DEVICE) for x in video_like(0, 1, layout.sequence, heads, head_dim, DTYPE, key_heads)]
    return layout, config, qkv


def run(layout, config, qkv, backend="triton", **options):
    return rectified_attention(*qkv, layout, config, backend=backend, return_stats=True, **options)


def rounded(x, dims, precision):
    """x in 8 bits, one scale for all that shares an index outside of `dims`."""
    most = x.abs().amax(dims, keepdim=True).clamp(min=1e-30)
    if precision == "int8-qk":
        return (x / most * 127).round() * most / 127
    return (x / most * 448).to(torch.float8_e4m3fn).double() * most / 448


def quantised(layout, config, qkv, mask, precision):
    """Plain sparse attention of the tiled queries in float64, exact and with what kept blocks multiply in 8 bits."""
    blocks = blocks_of(layout, config).on(DEVICE)
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale, size = q.shape[-1] ** -0.5, (blocks.num_blocks, blocks.block_size)
    tiled = [x[:, :, blocks.tiled].unflatten(2, size) for x in (q, k, v)]
    alone = [x[:, :, blocks.isolated] for x in (k, v)]
    results = []
    for eight in (False, True):
        q_all, k_all, v_all = tiled
        k_shift = v_shift = 0.0
        if eight:
            k_shift = k_all.mean((2, 3), keepdim=True)
            q_8, k_all = rounded(q_all, (-1,), precision), rounded(k_all - k_shift, (-2, -1), precision)
            if precision == "fp8":
                v_shift = v_all.mean((2, 3), keepdim=True)
                v_all = rounded(v_all - v_shift, (-2, -1), precision)
        here = q_8 if eight else q_all
        logits = torch.einsum("bhnid,bhmjd->bhnimj", here, k_all)
        if eight:
            logits += (q_all * k_shift).sum(-1)[..., None, None]
        logits = (logits * scale).masked_fill(~mask[:, :, :, None, :, None], -math.inf).flatten(4)
        rest = torch.einsum("bhnid,bhtd->bhnit", q_all, alone[0]) * scale
        weights = torch.cat([logits, rest], -1)
        top = weights.amax(-1, keepdim=True)
        weights = (weights - top).exp()
        kept, rest = weights.split([logits.shape[-1], rest.shape[-1]], -1)
        if eight and precision == "fp8":
            kept = (kept * 256).to(torch.float8_e4m3fn).double() / 256
        out = torch.einsum("bhnij,bhjd->bhnid", kept, v_all.flatten(2, 3)) + kept.sum(-1, keepdim=True) * v_shift
        out = out + torch.einsum("bhnit,bhtd->bhnid", rest, alone[1])
        results.append(out / weights.sum(-1, keepdim=True))
    return results, blocks


def apart(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_error_is_that_of_quantising(case, precision):
    """At most twice what rounding the same tensors does in float64, and at least a fourth of it: it is used."""
    layout, config, qkv = call(case, precision)
    out, stats = run(layout, config, qkv)
    (exact, eight), blocks = quantised(layout, config, qkv, stats.block_mask, precision)
    tiled = out[:, blocks.tiled].transpose(1, 2).unflatten(2, exact.shape[2:4])
    valid = torch.ones(1, layout.text, dtype=torch.bool, device=DEVICE)
    error, budget = apart(eight, exact), kernel_budget(qkv, layout, valid)
    assert error / 4 < apart(tiled, exact) < 2 * error + budget
    plain, _ = run(layout, config.replace(precision="inputs"), qkv, block_mask=stats.block_mask)
    assert torch.equal(out[:, blocks.isolated], plain[:, blocks.isolated])  # as if nothing were in 8 bits


@pytest.mark.parametrize("precision", EXACT)
def test_what_all_keys_and_values_share_costs_nothing(precision):
    layout, config, (q, k, v) = call("96", precision, rectify="query+slope", order="content")
    out, stats = run(layout, config, (q, k, v))
    moved = (q, k + 3, v - 5)
    same = {"block_mask": stats.block_mask, "token_order": stats.token_order}
    again, _ = run(layout, config, moved, **same)
    exact, _ = run(layout, config.replace(precision="inputs"), (q, k, v), **same)
    noise = apart(out, exact.double())
    assert noise > 1e-4
    assert apart(again + 5, exact.double()) < 1.5 * noise + 20 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_stays_so(precision, which):
    layout, config, qkv = call("plain", precision)
    blocks, place = blocks_of(layout, config).on(DEVICE), int(blocks_of(layout, config).tiled[70])
    mask = torch.eye(blocks.num_blocks, dtype=torch.bool, device=DEVICE).expand(1, 2, -1, -1)
    qkv["qkv".index(which)][0, place, 0, 3] = math.nan
    out, _ = run(layout, config, qkv, block_mask=mask)
    lost = out.isnan().any(-1)[0]
    assert not lost[:, 1].any()
    touched = torch.tensor([place], device=DEVICE) if which == "q" else blocks.tiled[64:128]
    text = blocks.isolated if which != "q" else blocks.tiled[:0]
    want = torch.zeros_like(lost[:, 0])
    want[torch.cat([touched, text])] = True
    assert torch.equal(lost[:, 0], want)


def test_others_refuse_it_and_say_who_can():
    for name in ("torch", "reference", "fa4"):
        reason = BACKENDS[name].why_not(Call(DEVICE, DTYPE, 64, 64, precision="fp8"))
        assert reason is not None
        if name != "fa4":  # which asks for triton and its package first
            assert "precision 'fp8', which triton runs" in reason
    with pytest.raises(
        ValueError, match=r"precision: got 'fp4'; allowed: one of \['inputs', 'int8-qk', 'fp8', 'auto'\]"
    ):
        SparseConfig(precision="fp4")
