"""rectified_attention against the oracle, in every dtype, and what every call must keep to."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import MODES, STRIDED, Call, calls, video_like
from oracle import Truth, choose_blocks, dense, oracle, sdpa
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends import torch as torch_backend
from rectified_spaattn.config import RECTIFY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEDIUM = TokenLayout.build((4, 8, 9), text=11)  # 9 blocks of 32, 11 text tokens
ODD = TokenLayout.build((5, 7, 9), text=13, text_first=True)  # 9 blocks of 32 and 27 leftover tokens


SMALL = SparseConfig(block_size=32)


def settled(block_size: int = 32, **settings: Any) -> SparseConfig:
    return SparseConfig(block_size=block_size, **{"order": "gilbert", **settings})


def truth_for(call: Call, block_mask: torch.Tensor, compensated: torch.Tensor) -> Truth:
    """The oracle with the choices of stage 3 made, and those of stage 4 where float32 may fall either way."""
    free = oracle(*call.arguments, **call.options, block_mask=block_mask)
    flipped = free.compensated != compensated
    assert not (flipped & ~free.undecided).any()
    if not flipped.any():
        return free
    return oracle(*call.arguments, **call.options, block_mask=block_mask, compensated=compensated)


def budget(call: Call, want: torch.Tensor) -> float:
    """Three times the error that SDPA makes in this dtype on these tensors, and one unit in the last place of the
    largest output: the operator rounds to the dtype twice (attention, then rectification), SDPA once.
    """
    q, k, v = call.qkv
    v = v.masked_fill(~call.valid.transpose(1, 3), 0)
    scale = call.options.get("scale")
    sees = None if call.valid.all() else call.valid
    error = sdpa(q, k, v, sees=sees, scale=scale).double() - dense(q, k, v, sees=sees, scale=scale)
    return 3 * error.abs().max().item() + torch.finfo(q.dtype).eps * want.abs().max().item()


def within_budget(call: Call) -> None:
    out, stats = rectified_attention(*call.arguments, **call.options, return_stats=True, backend="torch")
    assert out.dtype == call.qkv[0].dtype
    assert out.shape == call.qkv[0].shape
    want = truth_for(call, stats.block_mask, stats.compensated)
    torch.testing.assert_close(stats.probability.double(), want.probability, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(stats.r.double(), want.r, rtol=2e-5, atol=1e-6)
    assert stats.density == pytest.approx(want.density, rel=1e-6)
    assert stats.backend == "torch"
    assert (out.double() - want.out).abs().max().item() <= budget(call, want.out)


@settings(max_examples=120)
@given(call=calls(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_reference_is_the_oracle(call: Call, dtype: torch.dtype) -> None:
    """Two writings of the design, whatever the input's dtype: float64 within."""
    call.qkv = tuple(x.to(dtype) for x in call.qkv)
    want = oracle(*call.arguments, **call.options)
    out, stats = rectified_attention(*call.arguments, **call.options, return_stats=True, backend="reference")
    assert out.dtype == stats.probability.dtype == stats.r.dtype == torch.float64
    assert torch.equal(stats.block_mask, want.critical)
    assert torch.equal(stats.compensated, want.compensated)
    torch.testing.assert_close(stats.probability, want.probability, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.r, want.r, rtol=0, atol=1e-12)
    assert stats.density == pytest.approx(want.density, rel=1e-6)
    assert stats.backend == "reference"
    assert (out - want.out).abs().max().item() <= 1e-10


@settings(max_examples=120)
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_torch_is_the_oracle_within_the_error_of_sdpa(call: Call, dtype: torch.dtype) -> None:
    call.qkv = tuple(x.to(dtype) for x in call.qkv)
    within_budget(call)


@settings(max_examples=60)
@given(call=calls(min_blocks=2), dtype=st.sampled_from(DTYPES), keep=st.sampled_from((0.0, 0.2, 0.5, 1.0)))
def test_with_the_callers_blocks(call: Call, dtype: torch.dtype, keep: float) -> None:
    """Any pattern, empty rows too; stage 3 adds nothing to it."""
    call.qkv = tuple(x.to(dtype) for x in call.qkv)
    batch, _, heads, _ = call.qkv[0].shape
    nb = call.blocks.num_blocks
    mask = torch.rand(batch, heads, nb, nb, generator=torch.Generator().manual_seed(nb)) < keep
    if not call.blocks.leftover and not call.config.rule.tail:  # then a row may not be empty
        mask |= torch.eye(nb, dtype=torch.bool)
    options: dict[str, Any] = {**call.options, "block_mask": mask, "return_stats": True}

    out, stats = rectified_attention(*call.arguments, **options, backend="reference")
    assert torch.equal(stats.block_mask, mask)
    want = oracle(*call.arguments, **call.options, block_mask=mask)
    assert (out - want.out).abs().max().item() <= 1e-10

    out, stats = rectified_attention(*call.arguments, **options, backend="torch")
    assert torch.equal(stats.block_mask, mask)
    want = truth_for(call, mask, stats.compensated)
    assert (out.double() - want.out).abs().max().item() <= budget(call, want.out)


@pytest.mark.parametrize("mode", ["row", "query+slope"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_tail_needs_no_critical_block(backend: str, mode: str) -> None:
    """Nothing kept and nothing isolated: every query attends to the pooled keys."""
    layout = TokenLayout.build((2, 4, 8))
    call = Call(layout, settled(16, rectify=mode), video_like(4, 2, layout.sequence, 2, 8))
    mask = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    out = rectified_attention(*call.arguments, block_mask=mask, backend=backend)
    want = oracle(*call.arguments, block_mask=mask).out
    assert (out - want).abs().max().item() <= (1e-10 if backend == "reference" else budget(call, want))


@pytest.mark.parametrize("tail", ["row", "query+slope"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_is_as_exact_as_ipar(dtype: torch.dtype, tail: str) -> None:
    """log b is not rounded to half precision: that would be 1.6% of every pooled key in bfloat16."""
    layout = TokenLayout.build((4, 16, 16), 40)
    qkv = video_like(0, 1, layout.sequence, 2, 64, dtype)
    errors = {}
    for mode in ("ipar", tail):
        config = settled(128, sparsity=0.9, rectify=mode, top_p=0.0)
        out, stats = rectified_attention(*qkv, layout, config, return_stats=True, backend="torch")
        want = rectified_attention(*qkv, layout, config, block_mask=stats.block_mask, backend="reference")
        errors[mode] = ((out.double() - want).norm() / want.norm()).item()
    assert errors[tail] <= 1.5 * errors["ipar"]


@settings(max_examples=80)
@given(call=calls(modes=tuple(name for name, rule in RECTIFY.items() if rule.choice == "mass"), min_blocks=2))
def test_torch_keeps_the_blocks_that_its_own_probabilities_ask_for(call: Call) -> None:
    _, stats = rectified_attention(*call.arguments, **call.options, return_stats=True, backend="torch")
    blocks, alone = stats.probability.double().split([call.blocks.num_blocks, 1], dim=-1)
    sums = alone + blocks.sort(-1, descending=True).values.cumsum(-1)
    assume(((sums - call.config.top_p).abs() > 1e-6).all())  # else rounding decides
    assert torch.equal(stats.block_mask, choose_blocks(stats.probability, call.layout, call.config))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize("grid", [(2, 4, 8), (3, 5, 7)])
def test_without_text_or_none_that_is_valid(grid: tuple[int, int, int], text: int, mode: str, backend: str) -> None:
    """Then only leftover tokens are isolated keys: none in the first grid, 9 in the second."""
    layout = TokenLayout.build(grid, text=text)
    config = settled(16, rectify=mode, sparsity=0.6)
    options = {"text_mask": torch.zeros(2, text, dtype=torch.bool)}
    call = Call(layout, config, video_like(9, 2, layout.sequence, 2, 8), options)
    out, stats = rectified_attention(*call.arguments, **options, backend=backend, return_stats=True)
    want = truth_for(call, stats.block_mask, stats.compensated)
    torch.testing.assert_close(stats.probability.double(), want.probability, rtol=2e-5, atol=1e-6)
    assert (stats.probability[..., -1] > 0).all() == (grid == (3, 5, 7))
    assert (out - want.out).abs().max().item() <= (1e-10 if backend == "reference" else budget(call, want.out))


@pytest.mark.parametrize("layout", [MEDIUM, ODD])
def test_the_inputs_make_all_three_kinds_of_block(layout: TokenLayout) -> None:
    """Critical, compensated and rejected: otherwise the comparisons above prove little."""
    q, k, v = video_like(0, 2, layout.sequence, 2, 16)
    config = settled(sparsity=0.8, top_p=0, rectify="ipar+gapr")
    _, stats = rectified_attention(q, k, v, layout, config, return_stats=True)
    rejected = ~stats.block_mask & ~stats.compensated
    for kind in (stats.block_mask, stats.compensated, rejected):
        assert kind.float().mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [MEDIUM, ODD])
def test_halves_are_rounded_no_more_than_needed(layout: TokenLayout, mode: str, dtype: torch.dtype) -> None:
    """Attention and the result are rounded, and a tail's share where there is a slope; R and C are not. Two independent
    roundings: the square root of 2 of one.
    """
    config = settled(rectify=mode)
    call = Call(layout, config, video_like(11, 2, layout.sequence, 2, 32, dtype))
    out, stats = rectified_attention(*call.arguments, return_stats=True)
    want = truth_for(call, stats.block_mask, stats.compensated).out
    once = (want.to(dtype).double() - want).square().mean().sqrt()
    assert (out.double() - want).square().mean().sqrt() < (3 if config.rule.slope else 2) ** 0.5 * once


@pytest.mark.parametrize("mode", MODES)
def test_many_chunks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """72 query blocks of different counts, in one SDPA call a row, and in a few rows a call."""
    layout = TokenLayout.build((8, 12, 12), text=7)
    config = settled(rectify=mode, top_p=0.5, neighbours=True)
    call = Call(layout, config, video_like(3, 1, layout.sequence, 2, 32))
    within_budget(call)
    whole = rectified_attention(*call.arguments)
    for size in (1, 200_000):
        monkeypatch.setattr(torch_backend, "_CHUNK_BYTES_CPU", size)
        torch.testing.assert_close(rectified_attention(*call.arguments), whole, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(call=calls(), name=st.sampled_from(sorted(STRIDED)), backend=st.sampled_from(("torch", "reference")))
def test_strides_do_not_matter(call: Call, name: str, backend: str) -> None:
    strided = tuple(STRIDED[name](x) for x in call.qkv)
    contiguous = tuple(x.contiguous() for x in strided)
    got = rectified_attention(*strided, call.layout, call.config, **call.options, backend=backend)
    want = rectified_attention(*contiguous, call.layout, call.config, **call.options, backend=backend)
    assert torch.equal(got, want)


@settings(max_examples=40)
@given(call=calls(), backend=st.sampled_from(("torch", "reference")))
def test_inputs_stay_as_they_are_and_the_same_call_gives_the_same_bits(call: Call, backend: str) -> None:
    if call.blocks.num_blocks:
        nb, (batch, _, heads, _) = call.blocks.num_blocks, call.qkv[0].shape
        call.options["block_mask"] = torch.eye(nb, dtype=torch.bool).repeat(batch, heads, 1, 1)
    arguments = [*call.qkv, *(x for x in call.options.values() if isinstance(x, torch.Tensor))]
    before = [x.clone() for x in arguments]
    first, stats = rectified_attention(*call.arguments, **call.options, backend=backend, return_stats=True)
    for now, then in zip(arguments, before, strict=True):
        assert torch.equal(now, then)
    again, stats_again = rectified_attention(*call.arguments, **call.options, backend=backend, return_stats=True)
    assert torch.equal(first, again)
    for name in ("block_mask", "compensated", "probability", "r"):
        assert torch.equal(getattr(stats, name), getattr(stats_again, name))
        assert all(getattr(stats, name).data_ptr() != x.data_ptr() for x in arguments if x.numel())


@pytest.fixture
def poisoned() -> Any:
    """PyTorch fills every new, uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", [MEDIUM, ODD, TokenLayout.build((1, 3, 3), text=2)])
@pytest.mark.parametrize("text", ["all", "some", "none"])
def test_every_element_is_written_and_none_is_read_before(layout: TokenLayout, text: str, backend: str) -> None:
    assert torch.empty(9).isnan().all()
    assert torch.empty_like(torch.zeros(9)).isnan().all()
    assert torch.zeros(2).new_empty(9).isnan().all()
    mask = torch.tensor({"all": [1], "some": [1, 0], "none": [0]}[text]).bool().repeat(2, layout.text)[:, : layout.text]
    q, k, v = video_like(1, 2, layout.sequence, 2, 8)
    for mode in MODES:
        config = settled(rectify=mode, neighbours=True)
        out, stats = rectified_attention(q, k, v, layout, config, text_mask=mask, backend=backend, return_stats=True)
        assert not out.isnan().any()
        assert not stats.probability.isnan().any()
        assert not stats.r.isnan().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_large_logits(mode: str, size: float) -> None:
    """No overflow: every output is a mean of values, so it stays among them."""
    q, k, v = video_like(2, 1, ODD.sequence, 2, 8)
    config = settled(rectify=mode, neighbours=True)
    out, stats = rectified_attention(size * q, size * k, v, ODD, config, return_stats=True)
    assert out.isfinite().all()
    assert stats.probability.isfinite().all()
    assert (out <= v.amax(1, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-5).all()


@pytest.mark.parametrize("mode", MODES)
def test_float16_at_its_ends(mode: str) -> None:
    config = settled(rectify=mode, neighbours=True)
    q, k, v = (torch.sign(x).half() for x in video_like(4, 1, ODD.sequence, 2, 8))
    out = rectified_attention(q, k, v * 65504, ODD, config)
    assert out.isfinite().all()
    out = rectified_attention(q * 200, k * 200, v, ODD, config)  # unscaled logits to 320,000, beyond float16
    assert out.isfinite().all()
    assert (out.abs() <= 1).all()
    tiny = [x * 6e-8 for x in (q, k, v)]  # the smallest float16 above 0
    assert all((x != 0).all() for x in tiny)
    assert (rectified_attention(*tiny, ODD, config).abs() <= 6e-8).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("k_value", [0.0, 0.5])
def test_identical_keys_are_ties_and_ties_go_to_the_lower_index(backend: str, k_value: float) -> None:
    """Small integers times powers of two: every product is exact, so all logits of a row are equal."""
    layout = TokenLayout.build((4, 8, 8))
    q = torch.randint(-4, 5, (2, layout.sequence, 2, 4)).float()
    k, v = torch.full_like(q, k_value), torch.randn_like(q)
    config = settled(16, sparsity=0.7, top_p=0.0, rectify="row")
    _, stats = rectified_attention(q, k, v, layout, config, scale=0.25, return_stats=True, backend=backend)
    assert (stats.block_mask == (torch.arange(16) < 4)).all()  # floor(0.3 * 16)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("mode", ["ipar+gapr", "row"])
def test_autocast_casts_as_it_does_for_sdpa(mode: str, dtypes: tuple[torch.dtype, ...], autocast: torch.dtype) -> None:
    """Pipelines run under it, with q and k out of a norm in float32 and v in the weights' dtype. Plans stay float32."""
    qkv = [x.to(dtype) for x, dtype in zip(video_like(5, 2, MEDIUM.sequence, 2, 16), dtypes, strict=True)]
    config = settled(rectify=mode)
    want, plain = rectified_attention(*(x.to(autocast) for x in qkv), MEDIUM, config, return_stats=True)
    with torch.autocast("cpu", autocast):
        got, stats = rectified_attention(*qkv, MEDIUM, config, return_stats=True)
        assert sdpa(*qkv).dtype == got.dtype == autocast
    assert stats.probability.dtype == stats.r.dtype == torch.float32
    assert torch.equal(stats.block_mask, plain.block_mask)
    assert torch.equal(got, want)


def test_inference_mode_and_a_default_dtype_change_nothing() -> None:
    q, k, v = video_like(6, 1, ODD.sequence, 2, 8)
    want = rectified_attention(q, k, v, ODD, SMALL)
    with torch.inference_mode():
        assert torch.equal(rectified_attention(q, k, v, ODD, SMALL), want)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rectified_attention(q, k, v, ODD, SMALL), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_auto_is_torch_on_a_cpu_and_never_the_reference() -> None:
    q, k, v = video_like(7, 1, ODD.sequence, 1, 8)
    out, stats = rectified_attention(q, k, v, ODD, SMALL, return_stats=True)
    assert stats.backend == "torch"
    assert torch.equal(out, rectified_attention(q, k, v, ODD, SMALL, backend="torch"))


def test_defaults_are_the_default_config_and_the_usual_scale() -> None:
    layout = TokenLayout.build((4, 8, 9), text=11)
    q, k, v = video_like(8, 1, layout.sequence, 1, 16)
    all_valid = torch.ones(1, layout.text, dtype=torch.bool)
    want, stats = rectified_attention(
        q, k, v, layout, SparseConfig(), text_mask=all_valid, scale=0.25, return_stats=True
    )
    assert torch.equal(rectified_attention(q, k, v, layout), want)
    assert stats.block_mask.shape == (1, 1, 2, 2)
    assert stats.token_order is not None
    assert stats.sorting == "torch"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_refused_where_they_are_asked_for(which: int) -> None:
    qkv = list(video_like(10, 1, ODD.sequence, 1, 8))
    qkv[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"for inference.*no_grad"):
        rectified_attention(*qkv, ODD, SMALL)
    with torch.no_grad():
        assert not rectified_attention(*qkv, ODD, SMALL).requires_grad


# The interpreter is slow: one rule and four blocks there, the others with the slow tests; every mode elsewhere.
EDGES = list(product(("torch", "reference"), MODES, ("gilbert", "content")))
PLAIN_KERNELS = ("triton", "none", "gilbert")
SLOPE_KERNELS = ("triton", "query+slope", "content")
SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in (("triton", "ipar+gapr", "content"), SLOPE_KERNELS)]
NOT_FINITE = [(value, *each) for value, each in product((float("inf"), float("nan")), EDGES)]
NOT_FINITE += [(float("inf"), *PLAIN_KERNELS), (float("nan"), *SLOPE_KERNELS)]


def edge_layout(backend: str, text: int = 0) -> TokenLayout:
    return TokenLayout.build((2 if backend == "triton" else 4, 8, 16), text=text)


@pytest.mark.parametrize(("backend", "mode", "order"), [*EDGES, PLAIN_KERNELS, *SLOW])
def test_top_p_of_one_keeps_every_block(mode: str, backend: str, order: str) -> None:
    """Half of the rows have one key that outweighs all others: a float32 sum is 1 long before the last block."""
    layout = edge_layout(backend)
    q, k, v = video_like(12, 1, layout.sequence, 2, 64)
    q[:, : layout.sequence // 2] *= 40
    config = SparseConfig(sparsity=0.9, top_p=1, rectify=mode, order=order, block_size=64)  # type: ignore[arg-type]
    out, stats = rectified_attention(q, k, v, layout, config, backend=backend, return_stats=True)
    assert stats.block_mask.all()
    assert stats.density == 1
    assert (out - dense(q, k, v)).abs().max() < 1e-4


@pytest.mark.parametrize(("value", "backend", "mode", "order"), NOT_FINITE)
def test_what_is_not_finite_in_one_query_loses_that_row_alone(
    value: float, mode: str, backend: str, order: str
) -> None:
    """As with SDPA. Its block is computed in full: no estimate says what could be left out."""
    layout = edge_layout(backend, text=5)
    q, k, v = video_like(13, 1, layout.sequence, 2, 64)
    q[0, 37, 1, 3] = value
    config = SparseConfig(sparsity=0.9, top_p=0, rectify=mode, order=order, block_size=64)  # type: ignore[arg-type]
    out, stats = rectified_attention(q, k, v, layout, config, backend=backend, return_stats=True)
    lost = ~out.isfinite().all(-1)  # [B, S, H]
    assert lost.nonzero().tolist() == [[0, 37, 1]] == (~sdpa(q, k, v).isfinite().all(-1)).nonzero().tolist()
    full = stats.block_mask.all(-1)  # [B, H, nb]
    assert full.sum() == 1
    tokens = stats.token_order if order == "content" else Call(layout, config, (q, k, v)).blocks.tiled.expand(1, 2, -1)
    block = tokens.view(1, 2, -1, 64)[0, 1, full[0, 1].nonzero().item()]
    others = block[block != 37]
    assert (out[0, others, 1] - dense(q, k, v)[0, others, 1]).abs().max() < 1e-4
