"""The kernels of order "content" against the stage in PyTorch, and the operator with both against the reference."""

import pytest
import torch

from cases import MODES, STRIDED, kernel_budget
from rectified_spaattn import rectified_attention
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.backends.triton import arrange as kernels
from rectified_spaattn.backends.triton.directions import Axes, moments, of_sorting
from rectified_spaattn.method import arrange
from test_kernels import ALONE, DEVICE, FEW, NARROW, RAGGED, call

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.mark.parametrize(
    ("blocks", "block_size", "kind"),
    [
        *((1, 64, "normal"), (2, 64, "few values"), (3, 64, "equal"), (3, 64, "normal")),
        *(
            (9, 128, "few values"),
            (13, 64, "normal"),
            (33, 128, "few values"),
            (66, 64, "equal"),
        ),
    ],
)
def test_the_tree_is_that_of_the_stage(blocks, block_size, kind):
    """To the last token: both have the same bfloat16 features, and of equal ones the first go left."""
    points = torch.randn(2, blocks * block_size, 8, generator=torch.Generator().manual_seed(blocks))
    points = {"normal": points, "few values": points.round(), "equal": torch.zeros_like(points)}[kind]
    points = points.to(DEVICE, torch.bfloat16)
    places = torch.arange(points.shape[1], device=DEVICE).flip(0)
    got = kernels.k_d_order(points, places, block_size)
    assert torch.equal(got.long(), places[arrange.k_d_order(points, block_size)])


@pytest.mark.parametrize(
    ("head_dim", "group"),
    [(64, 1), (96, 2), *([(128, 1)] if DEVICE.type == "cuda" else [])],  # interpreting takes long
)
def test_moments_and_directions_are_those_of_the_stage(head_dim, group):
    generator = torch.Generator().manual_seed(0)
    long = torch.linspace(3, 0.3, head_dim)  # a spectrum whose directions are far apart
    heads = 2 if head_dim == 64 else 1
    k, *q = ((torch.randn(1, 900, heads, head_dim, generator=generator) * long.square() + 9) for _ in range(3))
    q, k = torch.stack(q[:group], 3).flatten(2, 3).to(DEVICE), k.to(DEVICE)
    places = torch.arange(900, device=DEVICE).flip(0)[:880]
    exact = arrange.moments(*(arrange.sample_of(x.double(), places, x.shape[2] // heads) for x in (q, k)), 0.1)
    found = moments(q, k, places, 0.1)
    blocks = torch.stack([exact.weigh[:, :head_dim, :head_dim], exact.weigh[:, head_dim:, head_dim:]], 1)
    whole = (found.mean, found.covariance.double().sum(0), found.weigh.double().sum(0))
    for got, want in zip(whole, (exact.mean[:, 0], exact.covariance, blocks), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * want.abs().max().item())
    want, axes = arrange.directions(exact).float(), of_sorting(found, torch.float32)
    torch.testing.assert_close(axes.shift[:, None], exact.mean.float() @ axes.w, rtol=1e-3, atol=1e-3)
    queries = q.unflatten(2, (heads, group)).mean(3)
    seen, told = (torch.cat([queries, k], -1).transpose(1, 2)[0] @ w for w in (axes.w, want))
    seen, told = (x - x.mean(1, keepdim=True) for x in (seen, told))
    sign = (seen * told).sum(1, keepdim=True).sign()
    assert ((sign * seen - told).norm(dim=1) <= 0.02 * told.norm(dim=1)).all()


@pytest.mark.parametrize("stride", ["contiguous", *STRIDED])
def test_projections_are_those_of_the_stage(stride):
    head_dim = 128 if stride == "contiguous" else 64
    q, k, _, blocks, *_ = call((*RAGGED[:4], head_dim), order="content")[1]
    q, k = (STRIDED.get(stride, torch.clone)(x) for x in (q, k))
    w = torch.randn(4, 2 * head_dim, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, q.dtype)
    shift = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = kernels.project(q, k, blocks.tiled, Axes(w, shift))
    both = torch.cat([x[:, blocks.tiled].transpose(1, 2).flatten(0, 1) for x in (q, k)], -1).double()
    want = both @ w.double() - shift[:, None].double()
    torch.testing.assert_close(got.double(), want, rtol=2.0**-7, atol=1e-3)  # the interpreter cuts bfloat16 off


RULES = {  # every mode with one shape, and "row", which sorts for itself, with all
    RAGGED: ("row", "query+slope", "pooled", "ipar+gapr"),
    ALONE: ("row", "none", "ipar", "row+slope"),
    NARROW: ("row",),
}
assert {mode for modes in RULES.values() for mode in modes} == set(MODES)


@pytest.mark.parametrize(("case", "group"), [(RAGGED, 1), (ALONE, 1), (NARROW, 3)])
def test_order_content_is_the_reference(case, group):
    """Sorted once; with that order the modes."""
    options = {"heads": group, "key_heads": 1} if group > 1 else {"heads": FEW}
    options["batch"] = 2 if case == RAGGED else 1
    layout, inputs = call(case, order="content", scale=case[-1] ** -0.5, **options)
    order = BACKENDS["triton"].sort(inputs)
    assert torch.equal(order.sort(-1).values, inputs.blocks.tiled.sort().values.expand_as(order))
    # in half precision rounding decides some cuts
    assert inputs.q.dtype != torch.float32 or torch.equal(order.long(), BACKENDS["torch"].sort(inputs))
    options = {"text_mask": inputs.text_mask, "return_stats": True}
    for mode in RULES[case]:
        config = inputs.config.replace(rectify=mode)
        given = options if mode == "row" else {**options, "token_order": order}
        out, stats = rectified_attention(*inputs[:3], layout, config, backend="triton", **given)
        assert stats.sorting == ("triton" if mode == "row" else "")
        assert torch.equal(stats.token_order, order.long())
        given = {**options, "token_order": order, "block_mask": stats.block_mask}
        want, exact = rectified_attention(*inputs[:3], layout, config, backend="reference", **given)
        same = (stats.compensated == exact.compensated).all(-1)
        assert same.all() or mode == "ipar+gapr"
        error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
        tiled = error.gather(2, order.long().repeat_interleave(group, 1))[
            same.repeat_interleave(inputs.blocks.block_size, -1)
        ]
        worst = torch.cat([tiled, error[..., inputs.blocks.isolated].flatten()]).max()
        assert worst <= kernel_budget(inputs[:3], layout, inputs.text_mask) * want.abs().max()
