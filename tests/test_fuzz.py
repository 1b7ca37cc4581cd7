"""Random calls of every kind against the oracle: `make slow-test`.

A case is its number. FUZZ_FIRST and FUZZ_CASES choose others: `FUZZ_FIRST=1200 make slow-test` goes on from there, and
`pytest -m slow tests/test_fuzz.py -k "[17]"` runs one.
"""

import os
import random
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
from cases import MODES, STRIDED, Call, video_like
from oracle import choose_blocks, dense, sdpa
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.config import ORDERS
from sorted_oracle import oracle_by_head

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FIRST, CASES = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_CASES", "2500"))


def random_call(rng: random.Random, backend: str) -> Call:
    """A call without choices of the caller's; what padding holds is no number in some."""
    kernels = backend == "triton"
    most = 450 if kernels else 300
    while True:
        grid = (rng.randint(1, 9), rng.randint(1, 14), rng.randint(1, 24))
        if grid[0] * grid[1] * grid[2] <= most:
            break
    layout = TokenLayout.build(grid, rng.choice((0, 1, 3, 17, 40, 70)), rng.random() < 0.5)
    order = rng.choice((*ORDERS, "content", "content"))
    if rng.random() < 0.3:
        some = rng.sample(range(layout.sequence), rng.randint(0, layout.sequence // 3))
        layout = layout.without(some)
    if order == "content" and rng.random() < 0.3:
        layout = TokenLayout.of(layout.sequence, layout.spans)
    config = SparseConfig(
        sparsity=rng.choice((0.0, 0.3, 0.6, 0.8, 0.95)),
        top_p=rng.choice((0.0, 0.1, 0.3, 0.8, 0.99, 1.0)),
        rectify=rng.choice(MODES),  # type: ignore[arg-type]
        block_size=64 if kernels else rng.choice((16, 32, 48, 64)),
        order=order,  # type: ignore[arg-type]
        neighbours=order != "content" and rng.random() < 0.3,
        first_frame=order != "content" and rng.random() < 0.3,
    )
    batch, heads = (rng.randint(1, 2) for _ in "bh") if kernels else (rng.randint(1, 3) for _ in "bh")
    head_dim = 64 if kernels else rng.choice((1, 4, 8, 20, 64))
    size = (batch, layout.sequence, heads, head_dim)
    seed = rng.randint(0, 2**30)
    qkv = video_like(seed, *size)
    if rng.random() < 0.3:
        generator = torch.Generator().manual_seed(seed)
        qkv = tuple(rng.choice((0.1, 1, 3)) * torch.randn(size, generator=generator) for _ in "qkv")  # type: ignore
    if rng.random() < 0.1:
        qkv = (qkv[0].round(), qkv[1].round(), qkv[2])  # many equal logits
    halves = (torch.float16,) if kernels else (torch.float16, torch.bfloat16)
    dtype = torch.float64 if backend == "reference" else rng.choice((torch.float32, torch.float32, *halves))
    options: dict[str, Any] = {"scale": rng.choice((None, None, 0.05, 0.3, 1.0))}
    if rng.random() < 0.6:
        mask = torch.rand(batch, layout.text, generator=torch.Generator().manual_seed(seed)) < rng.choice((0, 0.5, 0.9))
        if layout.text and layout.video < config.block_size and not layout.video:
            mask[:, 0] = True  # something must be left to attend to
        options["text_mask"] = mask
    strides = rng.choice((*STRIDED, "none", "none"))
    qkv = tuple(STRIDED.get(strides, torch.clone)(x.to(dtype)) for x in qkv)  # type: ignore[assignment]
    return Call(layout, config, qkv, options)


def choices_of(rng: random.Random, call: Call) -> dict[str, Any]:
    """block_mask and token_order of a caller, or nothing."""
    batch, _, heads, _ = call.qkv[0].shape
    nb, choices = call.blocks.num_blocks, {}
    generator = torch.Generator().manual_seed(rng.randint(0, 2**30))
    if rng.random() < 0.25:
        mask = torch.rand(batch, heads, nb, nb, generator=generator) < rng.choice((0.0, 0.3, 0.8))
        choices["block_mask"] = mask | torch.eye(nb, dtype=torch.bool)
    if call.config.by_content and rng.random() < 0.25:
        tiled = call.blocks.tiled
        mixed = torch.rand(batch, heads, len(tiled), generator=generator).argsort(-1)
        choices["token_order"] = tiled[mixed].to(rng.choice((torch.int32, torch.int64)))
    return choices


def poison_padding(rng: random.Random, call: Call) -> torch.Tensor:
    """Makes what invalid tokens hold no number, in some calls. Returns bool [B, S]: the queries to look at."""
    padding = ~call.valid[:, 0, 0]
    if rng.random() < 0.5 or not padding.any():
        return torch.ones_like(padding)
    filler = rng.choice((torch.nan, torch.inf, -torch.inf))
    call.qkv = tuple(x.masked_fill(padding[..., None, None], filler) for x in call.qkv)  # type: ignore[assignment]
    return ~padding


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", range(FIRST, FIRST + CASES))
def test_a_random_call(number: int) -> None:
    rng = random.Random(number)
    backend = rng.choice(("torch",) * 6 + ("reference",) + ("triton",) * 2)
    call = random_call(rng, backend)
    choices, looked_at = choices_of(rng, call), poison_padding(rng, call)
    out, stats = rectified_attention(*call.arguments, **call.options, **choices, backend=backend, return_stats=True)
    nb, exact = call.blocks.num_blocks, backend == "reference"
    assert (stats.backend, out.shape) == (backend, call.qkv[0].shape)
    assert out.dtype == (torch.float64 if exact else call.qkv[0].dtype)

    # what sorted, and how
    assert (stats.token_order is not None) == call.config.by_content
    assert bool(stats.sorting) == (call.config.by_content and "token_order" not in choices)
    if stats.token_order is not None:
        order, places = stats.token_order, call.blocks.tiled.sort().values
        assert torch.equal(order.sort(-1).values, places.expand_as(order))
        assert torch.equal(order, choices.get("token_order", order).long())

    # which blocks
    if "block_mask" in choices:
        assert torch.equal(stats.block_mask, choices["block_mask"])
    elif call.config.rule.choice == "error":  # the order of near errors is rounding's; test_residual.py has the rule
        assert stats.block_mask.any(-1).all()
    else:
        p = stats.probability.double()
        sums = p[..., -1:] + p[..., :-1].sort(-1, descending=True).values.cumsum(-1)
        sure = exact | ((sums - call.config.top_p).abs() > 1e-5).all(-1) | (call.config.top_p == 1)
        want_blocks = choose_blocks(stats.probability, call.layout, call.config)
        assert torch.equal(stats.block_mask & sure[..., None], want_blocks & sure[..., None])
    want = oracle_by_head(call, stats.token_order, stats.block_mask)
    flipped = want.compensated != stats.compensated
    assert not (flipped & ~want.undecided).any()
    if flipped.any():
        want = oracle_by_head(call, stats.token_order, stats.block_mask, stats.compensated)

    # how much of each, and what comes out
    loose: dict[str, float] = {"rtol": 0, "atol": 1e-12} if exact else {"rtol": 3e-4, "atol": 2e-6}
    torch.testing.assert_close(stats.probability.double(), want.probability, **loose)
    torch.testing.assert_close(stats.r.double(), want.r, **loose)
    assert stats.density == pytest.approx(want.density, rel=1e-5)
    assert (out.double() - want.out).abs()[looked_at].max() <= (1e-10 if exact else budget(call, looked_at, want.out))

    if not choices and nb and rng.random() < 0.3:
        plan = rsa.plan(*call.arguments, **call.options, backend=backend)
        assert torch.equal(rsa.attend(*call.qkv, plan)[looked_at], out[looked_at])


def budget(call: Call, looked_at: torch.Tensor, want: torch.Tensor) -> float:
    """Three times what SDPA is off on these tensors in their dtype, one rounding more, and planning in float32."""
    q, k, v = (x.masked_fill(~call.valid.transpose(1, 3), 0) for x in call.qkv)
    sees, scale = None if call.valid.all() else call.valid, call.options["scale"]
    error = (sdpa(q, k, v, sees=sees, scale=scale).double() - dense(q, k, v, sees=sees, scale=scale)).abs()
    rounding = (torch.finfo(q.dtype).eps + 2.0**-16) * want[looked_at].abs().max()
    return (3 * error[looked_at].max() + rounding).item()
