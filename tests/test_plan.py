"""plan and attend: rectified_attention in two halves, the first of which may serve later calls."""

import math
from itertools import product
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
from cases import MODES, Tensors, kernel_budget, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention

BACKENDS = ("torch", "triton", "reference")
ORDERS = ("content", "gilbert")
LAYOUT = TokenLayout.build((3, 8, 11), text=7)  # 4 blocks of 64 and 8 leftover tokens
SMALL = SparseConfig(block_size=16, sparsity=0.7, top_p=0.2)  # 16 blocks


def mask_of(batch: int) -> torch.Tensor:
    return torch.arange(LAYOUT.text) < torch.tensor([[LAYOUT.text], [3]])[:batch]


def steps(
    dtype: torch.dtype = torch.float32, head_dim: int = 64, batch: int = 1, heads: int = 2
) -> tuple[Tensors, Tensors]:
    """q, k, v of a step and of a later one, which is a little different."""
    now, other = (video_like(seed, batch, LAYOUT.sequence, heads, head_dim) for seed in (0, 1))
    later = tuple((0.9 * x + 0.3 * y).to(dtype) for x, y in zip(now, other, strict=True))
    return tuple(x.to(dtype) for x in now), later  # type: ignore[return-value]


# interpreted kernels sort for seconds, in every mode alike
HALVES = [case for case in product(MODES, BACKENDS, ORDERS) if case[1:] != ("triton", "content") or case[0] == "row"]


@pytest.mark.parametrize(("mode", "backend", "order"), HALVES)
def test_the_halves_make_the_whole_bit_by_bit(mode: str, backend: str, order: str) -> None:
    """And on a later step they are the call with the order and the blocks of the plan."""
    config = SparseConfig(sparsity=0.7, top_p=0.2, rectify=mode, order=order, block_size=64)  # type: ignore[arg-type]
    now, later = steps(heads=1 if backend == "triton" else 2)
    options: dict[str, Any] = {"scale": 0.15, "backend": backend}
    plan = rsa.plan(*now, LAYOUT, config, **options)
    out, stats = rectified_attention(*now, LAYOUT, config, **options, return_stats=True)
    assert torch.equal(plan.block_mask, stats.block_mask)
    assert plan.backend == stats.backend == backend
    assert (plan.token_order is None) == (order != "content")
    if stats.token_order is not None and plan.token_order is not None:
        assert torch.equal(plan.token_order.long(), stats.token_order)
    assert torch.equal(rsa.attend(*now, plan), out)

    choices = {"block_mask": plan.block_mask, "token_order": plan.token_order}
    got = rsa.attend(*later, plan)
    assert torch.equal(got, rectified_attention(*later, LAYOUT, config, **options, **choices))
    want, exact = rectified_attention(
        *later, LAYOUT, config, scale=0.15, backend="reference", **choices, return_stats=True
    )
    assert torch.equal(exact.block_mask, plan.block_mask)
    every = torch.ones(1, LAYOUT.text, dtype=torch.bool)
    assert (got.double() - want).abs().max() <= kernel_budget(later, LAYOUT, every) * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pools_gain_and_tail_are_taken_anew(dtype: torch.dtype) -> None:
    """On values that are all new: what was kept of the old ones would show."""
    config = SMALL.replace(rectify="ipar+gapr")
    now, later = steps(dtype, batch=2)
    plan = rsa.plan(*now, LAYOUT, config)
    assert torch.equal(
        rsa.attend(now[0], now[1], torch.ones_like(now[2]), plan).float().round(), torch.ones(1).expand_as(now[2])
    )
    choices: Any = {"block_mask": plan.block_mask, "token_order": plan.token_order, "return_stats": True}
    _, stats = rectified_attention(*later, LAYOUT, config, **choices)
    _, before = rectified_attention(*now, LAYOUT, config, **choices)
    assert not torch.equal(stats.compensated, before.compensated)
    assert torch.equal(rsa.attend(*later, plan), rectified_attention(*later, LAYOUT, config, **choices)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_is_compact(order: str) -> None:
    config = SMALL.replace(order=order)
    now, _ = steps(head_dim=8, batch=2)
    mask = mask_of(2)
    plan = rsa.plan(*now, LAYOUT, config, text_mask=mask)
    counts = plan.block_mask.sum(-1)
    most = int(counts.max())
    assert most < 16
    assert plan.kept.dtype == torch.int16
    assert plan.kept.shape == (2, 2, 16, most)
    for row, kept in zip(plan.block_mask.flatten(0, 2), plan.kept.flatten(0, 2), strict=True):
        blocks = row.nonzero().flatten().tolist()
        assert kept.tolist() == blocks + [-1] * (most - len(blocks))
    size = 2 * plan.kept.numel() + mask.numel()
    if order == "content":
        assert plan.token_order is not None
        assert (plan.token_order.dtype, plan.token_order.shape) == (torch.int32, (2, 2, 256))
        size += 4 * plan.token_order.numel()
    assert plan.nbytes == size
    assert plan.shape == (2, LAYOUT.sequence, 2, 8)
    assert plan.scale == 8**-0.5


def test_a_plan_keeps_the_text_mask() -> None:
    now, later = steps(head_dim=8, batch=2)
    mask = mask_of(2)
    plan = rsa.plan(*now, LAYOUT, SMALL, text_mask=mask)
    dirty = [x.clone() for x in later]
    for x in dirty[1:]:
        x[1, LAYOUT.text_places[3:]] = math.nan
    assert torch.equal(rsa.attend(*dirty, plan), rsa.attend(*later, plan))
    assert not torch.equal(rsa.attend(*later, plan), rsa.attend(*later, rsa.plan(*now, LAYOUT, SMALL)))


@pytest.mark.parametrize(
    ("layout", "sparsity"), [(TokenLayout.build((1, 3, 4), text=3), 0.8), (TokenLayout.build((2, 8, 8)), 0.0)]
)
def test_no_block_and_every_block(layout: TokenLayout, sparsity: float) -> None:
    qkv = video_like(0, 2, layout.sequence, 2, 8)
    config = SMALL.replace(sparsity=sparsity)
    plan = rsa.plan(*qkv, layout, config)
    nb = layout.video // 16
    assert plan.block_mask.shape == (2, 2, nb, nb)
    assert plan.block_mask.all()
    assert torch.equal(rsa.attend(*qkv, plan), rectified_attention(*qkv, layout, config))


def test_strides_and_autocast_as_in_one_call() -> None:
    now, later = steps(batch=2)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in later]
    plan = rsa.plan(*now, LAYOUT, SMALL)
    assert torch.equal(rsa.attend(*moved, plan), rsa.attend(*later, plan))
    with torch.autocast("cpu", torch.bfloat16):
        plan = rsa.plan(*now, LAYOUT, SMALL)
        out = rsa.attend(*now, plan)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, rectified_attention(*now, LAYOUT, SMALL))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_attend_compiles_as_one_graph(order: str, backend: str) -> None:
    now, later = steps(head_dim=8, batch=2)
    plan = rsa.plan(*now, LAYOUT, SMALL.replace(order=order), text_mask=mask_of(2))
    compiled = torch.compile(lambda q, k, v: rsa.attend(q, k, v, plan) + 1, backend=backend, fullgraph=True)
    for qkv in (now, later):
        assert torch.equal(compiled(*qkv), rsa.attend(*qkv, plan) + 1)


@pytest.mark.parametrize("which", range(3))
def test_other_shapes_and_devices_are_refused(which: int) -> None:
    now, _ = steps(head_dim=8)
    plan = rsa.plan(*now, LAYOUT, SMALL)
    shorter = [x[:, :-1] if i >= which else x for i, x in enumerate(now)]
    with pytest.raises(ValueError, match=r"got shape \(1, 270, 2, 8\).*allowed.*\(1, 271, 2, 8\)"):
        rsa.attend(*shorter, plan)
    elsewhere = [x.to("meta") if i >= which else x for i, x in enumerate(now)]
    with pytest.raises((ValueError, TypeError), match=r"on meta; allowed"):
        rsa.attend(*elsewhere, plan)
    with pytest.raises(TypeError, match="plan: got SparseConfig; allowed"):
        rsa.attend(*now, SMALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"backend": "fastest"}, {"scale": -1.0}, {"text_mask": torch.ones(2, 7)}])
def test_plan_refuses_what_the_call_refuses(bad: dict[str, Any]) -> None:
    now, _ = steps(head_dim=8, batch=2)
    messages = []
    for call in (rsa.plan, rectified_attention):
        with pytest.raises((ValueError, TypeError), match=r"got .*allowed") as error:
            call(*now, LAYOUT, SMALL, **bad)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
