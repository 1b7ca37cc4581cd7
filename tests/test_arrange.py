"""Order "content": what sorting promises, and that the operator is the method on the tokens so sorted."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import rectified_spaattn as rsa
import tiny
from cases import MODES, Call, calls, video_like
from oracle import dense
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.method.arrange import content_order, directions, k_d_order, moments
from rectified_spaattn.orders import blocks_of
from sorted_oracle import oracle_by_head

LAYOUT = TokenLayout.build((3, 8, 11), 7)  # 264 video tokens: 16 blocks of 16 and 8 left over


def small(sparsity: float = 0.6, mode: str = "row") -> SparseConfig:
    return SparseConfig(sparsity=sparsity, rectify=mode, block_size=16)  # type: ignore[arg-type]


def sorted_call(call: Call) -> Call:
    """The same call with blocks by content, which lie nowhere in the video."""
    return replace(call, config=call.config.replace(order="content", neighbours=False, first_frame=False))


@settings(max_examples=60)
@given(call=calls(min_blocks=1).map(sorted_call), backend=st.sampled_from(("reference", "torch")))
def test_the_operator_is_the_method_on_sorted_tokens(call: Call, backend: str) -> None:
    out, stats = rectified_attention(*call.arguments, **call.options, return_stats=True, backend=backend)
    assert stats.sorting == "torch"
    assert stats.token_order is not None
    assert torch.equal(stats.token_order.sort(-1).values, call.blocks.tiled.sort().values.expand_as(stats.token_order))
    want = oracle_by_head(call, stats.token_order, stats.block_mask, stats.compensated).out
    error = (out.double() - want).abs().max().item()
    assert error <= (1e-10 if backend == "reference" else 1e-4 * want.abs().max().item())
    again = {**call.options, "token_order": stats.token_order.int(), "backend": backend, "return_stats": True}
    same, stats_again = rectified_attention(*call.arguments, **again)
    assert torch.equal(same, out)
    assert stats_again.sorting == ""
    assert torch.equal(stats_again.token_order, stats.token_order)


@pytest.mark.parametrize("mode", MODES)
def test_all_blocks_kept_is_dense_attention(mode: str) -> None:
    qkv = video_like(1, 2, LAYOUT.sequence, 3, 8)
    out = rectified_attention(*qkv, LAYOUT, small(0.0, mode))
    assert (out - dense(*qkv)).abs().max().item() <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_masses_sum_to_one(mode: str) -> None:
    """With values of 1 every output is the sum of a query's weights."""
    q, k, v = video_like(2, 2, LAYOUT.sequence, 3, 8)
    out = rectified_attention(q, k, torch.ones_like(v), LAYOUT, small(0.8, mode))
    assert (out - 1).abs().max().item() <= 1e-5


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 40),
    block_size=st.sampled_from((1, 2, 16)),
    rank=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(("normal", "few values", "equal")),
)
def test_a_k_d_order_is_a_permutation_and_keeps_ties(
    blocks: int, block_size: int, rank: int, seed: int, kind: str
) -> None:
    points = torch.randn(2, blocks * block_size, rank, generator=torch.Generator().manual_seed(seed))
    points = {"normal": points, "few values": points.round(), "equal": torch.zeros_like(points)}[kind]
    order = k_d_order(points, block_size)
    every = torch.arange(blocks * block_size).expand(2, -1)
    assert torch.equal(order.sort(-1).values, every)
    if kind == "equal":
        assert torch.equal(order, every)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 13, 32, 33])
def test_a_k_d_order_on_a_line_is_sorting(blocks: int) -> None:
    """One axis: every cut is at a whole number of blocks, so that blocks hold what they hold when all is sorted."""
    line = torch.randn(3, blocks * 16, 1, generator=torch.Generator().manual_seed(blocks))
    found = line.gather(1, k_d_order(line, 16)[..., None]).view(3, blocks, 16).sort(-1).values
    assert torch.equal(found, line[..., 0].sort(-1).values.view(3, blocks, 16))


def test_directions_are_the_principal_ones() -> None:
    """Against an eigendecomposition of what they are said to be, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 500, 12, generator=generator, dtype=torch.float64) for _ in "qk")
    stretch = torch.linspace(4, 0.5, 12).double()
    q, k, scale = q * stretch + 1, k * stretch.flip(0) - 2, 12**-0.5
    w = directions(moments(q, k, scale))
    apart = torch.cat([q - q.mean(1, keepdim=True), k - k.mean(1, keepdim=True)], -1)
    k_apart = k - k.mean(1, keepdim=True)
    for z in range(2):
        halves = []
        for x in (k_apart[z], q[z]):  # queries are told apart by the keys there are, and the other way round
            values, vectors = torch.linalg.eigh(scale**2 * x.T @ x / 500)
            halves.append(vectors * values.sqrt() @ vectors.T)
        seen = apart[z] @ torch.block_diag(*halves)
        values = torch.linalg.eigvalsh(seen.T @ seen / 500).flip(0)
        found = apart[z] @ w[z]
        spread = (found.square().mean(0)).sort(descending=True).values
        torch.testing.assert_close(spread[:3], values[:3], rtol=0.02, atol=0)
        overlap = found.T @ found / 500
        assert (overlap - overlap.diagonal().diag()).abs().max() <= 0.05 * values[0]


def test_blocks_hold_tokens_that_attend_alike() -> None:
    """Tokens of 16 kinds, strewn over the video: blocks in space hold all kinds, blocks by content one."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(16).repeat(16)[torch.randperm(256, generator=generator)]
    centre = 4 * torch.randn(2, 16, 32, generator=generator)
    q, k = (
        centre[which][kinds][None, :, None] + 0.3 * torch.randn(1, 256, 1, 32, generator=generator) for which in (0, 1)
    )
    v = torch.randn(16, 32, generator=generator)[kinds][None, :, None] + 0.1 * torch.randn(
        1, 256, 1, 32, generator=generator
    )
    errors = {}
    for order in ("gilbert", "content"):
        config = SparseConfig(sparsity=0.75, top_p=0.0, block_size=16, order=order)  # type: ignore[arg-type]
        out, stats = rectified_attention(q, k, v, TokenLayout.build((4, 8, 8)), config, return_stats=True)
        errors[order] = ((out - dense(q, k, v)).norm() / dense(q, k, v).norm()).item()
    assert stats.token_order is not None
    in_blocks = kinds[stats.token_order[0, 0]].view(16, 16)
    pure = (in_blocks == in_blocks.mode(-1, keepdim=True).values).float().mean()
    assert pure > 0.8  # by chance: 0.2
    assert errors["content"] < 0.6 * errors["gilbert"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_none_still_give_an_order(bad: float) -> None:
    tiled = blocks_of(LAYOUT, small()).tiled
    q, k, _ = video_like(3, 2, LAYOUT.sequence, 2, 8)
    q[0, 5, 0, 0] = bad
    order = content_order(q, k, tiled, block_size=16, scale=0.3)
    assert torch.equal(order.sort(-1).values, tiled.sort().values.expand_as(order))
    clean = content_order(q[1:], k[1:], tiled, block_size=16, scale=0.3)
    assert torch.equal(order[1:], clean)  # the other sample does not mind


def test_padding_does_not_matter() -> None:
    q, k, v = video_like(4, 2, LAYOUT.sequence, 2, 8)
    valid = torch.ones(2, LAYOUT.text, dtype=torch.bool)
    valid[:, 3:] = False
    clean = rectified_attention(q, k, v, LAYOUT, small(), text_mask=valid)
    for x in (k, v):
        x[:, LAYOUT.text_places[3:]] = torch.nan
    assert torch.equal(rectified_attention(q, k, v, LAYOUT, small(), text_mask=valid), clean)


def test_blocks_without_a_place_have_no_neighbours() -> None:
    for name in ("neighbours", "first_frame"):
        with pytest.raises(ValueError, match=f"{name}: got True with order='content'.*Pass {name}=False"):
            SparseConfig(order="content", **{name: True})


@pytest.mark.parametrize("order", ["gilbert", "tile", "raster"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_sorts_in_space(order: str, backend: str) -> None:
    q, k, v = video_like(5, 1, 128, 1, 64)
    config = SparseConfig(block_size=64, order=order)  # type: ignore[arg-type]
    layout = TokenLayout.build((2, 8, 8))
    _, stats = rectified_attention(q, k, v, layout, config, backend=backend, return_stats=True)
    assert (stats.sorting, stats.token_order) == ("", None)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(2, 2, 256), TypeError, "token_order: got torch.float32; allowed: an int32 or int64"),
        (torch.zeros(2, 2, 255, dtype=torch.int64), ValueError, r"token_order: got shape \(2, 2, 255\)"),
        (torch.zeros(2, 2, 256, dtype=torch.int64, device="meta"), ValueError, "on meta; allowed"),
        ([[0]], TypeError, "token_order: got list"),
    ],
)
def test_an_order_that_is_none_is_refused(bad: Any, error: type[Exception], message: str) -> None:
    qkv = video_like(0, 2, LAYOUT.sequence, 2, 8)
    with pytest.raises(error, match=message):
        rectified_attention(*qkv, LAYOUT, small(), token_order=bad)
    order = torch.zeros(2, 2, 256, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_order: got one with order='gilbert'"):
        rectified_attention(*qkv, LAYOUT, small().replace(order="gilbert"), token_order=order)


def test_one_line_enables_it_and_one_call_takes_it_back() -> None:
    model, inputs = tiny.hunyuan_transformer(), tiny.hunyuan_inputs()
    with torch.no_grad():
        untouched = model(**inputs).sample
        options = {"block_size": 16, "order": "content", "neighbours": False, "first_frame": False}
        handle = rsa.enable(model, sparsity=0.0, **options)
        torch.testing.assert_close(model(**inputs).sample, untouched, rtol=1e-4, atol=1e-5)
        assert "order content" in handle.summary()
        handle.disable()
        assert torch.equal(model(**inputs).sample, untouched)


def test_sorting_on_a_gpu_neither_reads_nor_writes_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without data every read raises, and no tensor may live elsewhere; the kernels do not run here."""
    from rectified_spaattn.backends.triton import arrange as kernels
    from rectified_spaattn.backends.triton import directions

    launched: list[str] = []
    for module, names in (
        (directions, ("_moments_kernel", "_directions_kernel")),
        (kernels, ("_project_kernel", "_cut_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launcher(partial(note, launched, name)))
    q, k = (torch.empty(2, LAYOUT.sequence, 3, 64, device="meta", dtype=torch.bfloat16) for _ in "qk")
    blocks = blocks_of(LAYOUT, SparseConfig(block_size=64)).on(torch.device("meta"))
    elsewhere = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            elsewhere.extend(str(func) for x in leaves if isinstance(x, torch.Tensor) and x.device.type != "meta")
            return out

    with Watch():
        order = kernels.content_order(q, k, blocks, 0.1)
    assert (order.shape, order.dtype) == ((2, 3, 4 * 64), torch.int32)
    assert launched == ["_moments_kernel", "_directions_kernel", "_project_kernel", "_cut_kernel"]
    assert elsewhere == []


def note(launched: list[str], name: str, *_: Any, **__: Any) -> None:
    launched.append(name)


class Launcher:
    """What `kernel[grid]` is."""

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __getitem__(self, grid: Any) -> Any:
        return self.launch
