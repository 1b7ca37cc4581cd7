"""The Triton kernels against the stages and the oracle: interpreted on a CPU, compiled where there is a GPU."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cases import MODES, STRIDED, kernel_budget, seen, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends.call import Call
from rectified_spaattn.backends.triton import why_not
from rectified_spaattn.kernels import arrange as sorting
from rectified_spaattn.kernels.attend import Partial, attend
from rectified_spaattn.kernels.plan import BlockLists, make_plan, select
from rectified_spaattn.kernels.tile import tile
from rectified_spaattn.method import arrange
from rectified_spaattn.method import plan as method
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.select import select as select_stage

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = torch.float32 if DEVICE.type == "cpu" else torch.float16  # the kernels take float32 in the interpreter alone
DTYPES = (torch.float16, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)

# grid, text, text first, block size, head_dim: no leftover, leftover, text above a block, nothing isolated, no block
RAGGED = ((2, 7, 11), 17, True, 64, 64)
CASES = [
    ((2, 8, 12), 40, False, 64, 64),
    RAGGED,
    ((3, 5, 26), 70, False, 128, 64),
    ((2, 8, 8), 0, False, 64, 128),
    ((2, 3, 5), 12, False, 64, 64),
]


def inputs(grid, text, text_first, block_size, head_dim, dtype=EXACT, batch=2, heads=2):
    """layout on the device; q, k, v; which text tokens are valid: all of one sample, scattered ones of the other."""
    layout = TokenLayout.build(grid, text, text_first, block_size)
    qkv = [x.to(DEVICE) for x in video_like(0, batch, layout.sequence, heads, head_dim, dtype)]
    valid = torch.ones(batch, text, dtype=torch.bool)
    valid[1, ::3] = False
    valid[1, text // 2 :] = False
    return layout.on(DEVICE), qkv, valid.to(DEVICE)


def whole(halves):
    return halves.double().sum(0)


def blocks_of(x, layout):
    # [B, S, H, D] -> [B, H, nb, b, D]
    return x[:, layout.tiled].transpose(1, 2).unflatten(2, (layout.num_blocks, layout.block_size))


def staged(qkv, layout, valid, config, scale, block_mask=None):
    """The plan by the stages in float64."""
    q, k, v = (x.double() for x in qkv)
    keys_valid = torch.cat([valid.new_ones(len(valid), layout.leftover), valid], 1)
    tiled = (blocks_of(x, layout) for x in (q, k, v))
    return method.make_plan(
        *tiled, k[:, layout.isolated].transpose(1, 2), keys_valid, layout, config, scale, block_mask
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["ipar", "ipar+gapr", "row"])
def test_tile_orders_and_pools_in_one_pass(case, dtype, mode):
    layout, (q, k, v), valid = inputs(*case, dtype)
    text_at = layout.isolated[layout.leftover :]
    for x in (k, v):  # whatever padding holds, it must not get further than here
        for sample in range(2):
            x[sample, text_at[~valid[sample]]] = torch.nan
    tiled = tile(q, k, v, layout, valid, mode)
    nb, b = layout.num_blocks, layout.block_size
    for x, block_ordered in ((q, tiled.q[:, :, : nb * b]), (k, tiled.k), (v, tiled.v)):
        assert torch.equal(block_ordered.unflatten(2, (nb, b)), blocks_of(x, layout))
    isolated = layout.isolated.numel()
    keep = torch.cat([valid.new_ones(2, layout.leftover), valid], 1)[:, None, :, None]
    assert torch.equal(tiled.q[:, :, nb * b :][:, :, :isolated], q[:, layout.isolated].transpose(1, 2))
    for x, tail in ((k, tiled.k_tail), (v, tiled.v_tail)):
        assert torch.equal(tail[:, :, :isolated], x[:, layout.isolated].transpose(1, 2).masked_fill(~keep, 0))
        assert not tail[:, :, isolated:].any()
    assert torch.equal(tiled.tail_bias[:, :isolated] == 0, keep[:, 0, :, 0])
    assert (tiled.tail_bias[:, isolated:] == -math.inf).all()
    for sample in range(2):
        places = keep[sample, 0, :, 0].nonzero()
        assert tiled.tail_end[sample] == (places.max() + 1 if len(places) else 0)
    want = pool(*(blocks_of(x.double(), layout) for x in (q, k, v)), mode)
    for got, exact in zip(tiled.pooled, want, strict=True):
        assert (got is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(whole(got), exact, rtol=2e-5, atol=1e-6)
    for got, exact in ((tiled.k_pool, want.k), (tiled.v_pool, want.v)):
        assert (got is not None) == (mode == "row")
        if got is not None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got[:, :, :nb].double(), exact, rtol=eps, atol=1e-6)
            assert not got[:, :, nb:].any()


@pytest.mark.parametrize("stride", STRIDED)
def test_any_strides(stride):
    layout, qkv, valid = inputs(*RAGGED)
    config = SparseConfig(sparsity=0.5, neighbours=False)
    plain, strided = (
        rectified_attention(*given, layout, config, text_mask=valid, backend="triton")
        for given in ([STRIDED["one head expanded"](x) if "expanded" in stride else x for x in qkv],
                      [STRIDED[stride](x) for x in qkv])
    )  # fmt: skip
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES[:4])
def test_plan_is_that_of_the_stages(case, mode):
    layout, qkv, valid = inputs(*case)
    config = SparseConfig(sparsity=0.6, top_p=0.5, rectify=mode, order="gilbert", first_frame=case is RAGGED)
    scale = 0.2
    plan, lists = make_plan(tile(*qkv, layout, valid, mode), layout, config, scale, None)
    want = staged(qkv, layout, valid, config, scale)
    torch.testing.assert_close(plan.probability.double(), want.probability, rtol=2e-4, atol=1e-6)
    assert torch.equal(plan.block_mask, want.block_mask)
    assert torch.equal(plan.compensated, want.compensated)
    torch.testing.assert_close(plan.r.double(), want.r, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(plan.c.double(), want.c, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(plan.probability.sum(-1), torch.ones_like(plan.r))
    assert (plan.tail is not None) == (mode == "row")
    if plan.tail is not None:
        torch.testing.assert_close(plan.tail.bias.double(), want.tail.bias, rtol=2e-4, atol=1e-5)
        assert torch.equal(plan.tail.bias.isfinite(), plan.compensated)
    check_lists(lists, plan.block_mask)


def check_lists(lists, block_mask):
    nb = block_mask.shape[-1]
    assert torch.equal(lists.counts[..., :nb], block_mask.sum(-1).int())
    assert (lists.counts[..., nb:] == nb).all()
    assert lists.counts.dtype == lists.indices.dtype == torch.int32
    for count, index, row in zip(
        lists.counts[..., :nb].flatten(),
        lists.indices[..., :nb, :].flatten(0, 2),
        block_mask.flatten(0, 2),
        strict=True,
    ):
        assert torch.equal(index[:count], row.nonzero()[:, 0].int())
    of_isolated = lists.indices[..., nb:, :]
    assert torch.equal(of_isolated, torch.arange(nb, device=DEVICE).int().expand_as(of_isolated))


@pytest.mark.parametrize(
    ("blocks", "sparsity", "top_p"),
    [(1, 0.9, 0.3), (7, 0.0, 0.3), (7, 0.5, 0.0), (7, 0.5, 0.9), (21, 0.5, 0.3), (21, 0.9, 0.0), (21, 0.9, 0.97)],
)
def test_selection_is_that_of_a_stable_sort_however_many_ties(blocks, sparsity, top_p):
    layout = TokenLayout.build((blocks, 1, 64), 3, block_size=64).on(DEVICE)
    generator = torch.Generator().manual_seed(blocks)
    # eighths, so that sums are exact and many are equal; one row of zeros, one with everything in one block
    weight = torch.randint(0, 3, (1, 2, blocks, blocks + 1), generator=generator).float().to(DEVICE)
    weight[0, 0, 0] = 0
    weight[..., -1] = 1
    weight[0, 1, 0, 0] = 1000
    probability = weight / weight.sum(-1, keepdim=True)
    config = SparseConfig(sparsity=sparsity, top_p=top_p, neighbours=False, rectify="ipar")
    logits = weight.log()
    critical = torch.empty(1, 2, blocks, blocks, dtype=torch.bool, device=DEVICE)
    compensated, r = torch.empty_like(critical), probability.new_empty(1, 2, blocks)
    count = torch.empty(1, 2, blocks + 1, dtype=torch.int32, device=DEVICE)
    lists = BlockLists(count, count.new_empty(1, 2, blocks + 1, blocks))
    select(layout, config, logits, critical, compensated, r, lists, None, given=False)
    torch.testing.assert_close(logits, probability)
    want = select_stage(logits, layout, config)
    # top-p at exactly the sum of the blocks before may fall on either side of it in float32
    sums = logits[..., -1:] + (logits[..., :-1].sort(-1, descending=True).values.cumsum(-1))
    sure = ((sums - top_p).abs() > 1e-6).all(-1)
    assert sure.float().mean() > 0.5
    assert torch.equal(critical[sure], want[sure])
    assert torch.equal(compensated, ~critical)
    check_lists(lists, critical)


def test_a_block_mask_takes_the_place_of_selection():
    layout, qkv, valid = inputs(*CASES[0])
    nb = layout.num_blocks
    block_mask = torch.rand(2, 2, nb, nb, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.4
    block_mask[0, 0, 0] = False  # a row without any block has its isolated keys
    config = SparseConfig(sparsity=0.9, rectify="ipar+gapr")
    given = {"text_mask": valid, "block_mask": block_mask, "return_stats": True}
    out, stats = rectified_attention(*qkv, layout, config, **given, backend="triton")
    want, oracle = rectified_attention(*qkv, layout, config, **given, backend="reference")
    assert torch.equal(stats.block_mask, block_mask)
    assert torch.equal(stats.compensated, oracle.compensated)
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


def test_a_query_block_without_any_key_is_not_a_number():
    layout, qkv, _ = inputs(*CASES[3])
    nb = layout.num_blocks
    block_mask = torch.eye(nb, dtype=torch.bool, device=DEVICE).expand(2, 2, nb, nb).clone()
    block_mask[1, 1, 0] = False
    out = rectified_attention(*qkv, layout, SparseConfig(rectify="ipar+gapr"), block_mask=block_mask, backend="triton")
    hit = out[:, layout.tiled].unflatten(1, (nb, -1)).isnan().all(-1).all(2)  # [B, nb, H]
    assert hit.nonzero().tolist() == [[1, 0, 1]]
    assert out.isnan().sum() == layout.block_size * out.shape[-1]


def test_row_needs_no_critical_block():
    layout, qkv, _ = inputs(*CASES[3])
    block_mask = torch.zeros(2, 2, layout.num_blocks, layout.num_blocks, dtype=torch.bool, device=DEVICE)
    given = {"block_mask": block_mask, "config": SparseConfig(rectify="row")}
    out, want = (rectified_attention(*qkv, layout, **given, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


def error_of(out, want):
    return (out.double() - want).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["ipar+gapr", "row"])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_sdpa(case, mode, dtype):
    layout, qkv, valid = inputs(*case, dtype)
    config = SparseConfig(sparsity=0.6, neighbours=False, rectify=mode)
    given = {"text_mask": valid, "return_stats": True}
    out, stats = rectified_attention(*qkv, layout, config, **given, backend="triton")
    want, oracle = rectified_attention(*qkv, layout, config, **given, backend="reference", block_mask=stats.block_mask)
    assert out.dtype == dtype
    assert torch.equal(stats.compensated, oracle.compensated)
    assert error_of(out, want) <= kernel_budget(qkv, layout, valid) * want.abs().max().item()


def test_all_blocks_kept_is_full_attention():
    layout, qkv, valid = inputs(*RAGGED)
    out = rectified_attention(*qkv, layout, SparseConfig(sparsity=0.0), text_mask=valid, backend="triton")
    exact = (x.double().transpose(1, 2) for x in qkv)
    want = scaled_dot_product_attention(*exact, attn_mask=seen(layout, valid)).transpose(1, 2)
    assert error_of(out, want) < 1e-3


@pytest.mark.parametrize("mode", ["ipar+gapr", "row"])
@pytest.mark.parametrize("case", [CASES[2], RAGGED])
def test_log_sum_exp_and_a_partial_result_taken_up(case, mode):
    """LSE is that of the keys attended to; attention over the listed blocks may be done elsewhere."""
    layout, qkv, valid = inputs(*case)
    config, scale = SparseConfig(sparsity=0.5, neighbours=False, rectify=mode), 0.15
    tiled = tile(*qkv, layout, valid, mode)
    plan, lists = make_plan(tiled, layout, config, scale, None)
    out, lse = attend(tiled, lists, plan, layout, scale)
    nb, b, rows = layout.num_blocks, layout.block_size, tiled.q.shape[2]
    tail_rows = rows - nb * b
    logits = scale * tiled.q.double() @ torch.cat([tiled.k, tiled.k_tail], 2).double().transpose(-1, -2)
    listed = torch.cat([plan.block_mask, plan.block_mask.new_ones(2, 2, tail_rows // b, nb)], 2)
    listed = listed.repeat_interleave(b, 2).repeat_interleave(b, 3)
    to_blocks = logits[..., : nb * b].masked_fill(~listed, -math.inf)
    to_tail = logits[..., nb * b :] + tiled.tail_bias.double()[:, None, None]
    every = [to_blocks, to_tail]
    if plan.tail is not None:
        to_pool = scale * tiled.q[:, :, : nb * b].double() @ plan.tail.k[:, :, :nb].double().transpose(-1, -2)
        to_pool = to_pool + plan.tail.bias.double().repeat_interleave(b, 2)
        every.append(torch.cat([to_pool, to_pool.new_full((*to_pool.shape[:2], tail_rows, nb), -math.inf)], 2))
    torch.testing.assert_close(lse.double(), torch.cat(every, -1).logsumexp(-1), rtol=1e-3, atol=1e-3)
    partial = Partial((to_blocks.softmax(-1) @ tiled.v.double()).to(out.dtype), to_blocks.logsumexp(-1).float())
    resumed, again = attend(tiled, lists, plan, layout, scale, partial)
    torch.testing.assert_close(resumed, out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(again, lse, rtol=1e-3, atol=1e-3)


@pytest.fixture
def uninitialised_memory_is_nan():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("mode", ["ipar+gapr", "row"])
@pytest.mark.parametrize("case", CASES)
def test_every_output_is_written_and_the_same_bits_come_twice(case, mode):
    layout, qkv, valid = inputs(*case)
    assert torch.empty(3).isnan().all()
    config = SparseConfig(sparsity=0.6, rectify=mode, order="gilbert", neighbours=True)
    given = {"text_mask": valid, "backend": "triton", "return_stats": True}
    first, second = (rectified_attention(*qkv, layout, config, **given) for _ in range(2))
    assert first[0].isfinite().all()
    assert torch.equal(first[0], second[0])
    for name in ("block_mask", "compensated", "probability", "r"):
        one, other = getattr(first[1], name), getattr(second[1], name)
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_why_not():
    call = Call(DEVICE, EXACT, 64, 64)
    assert why_not(call) is None
    for changed, told in (
        ({"head_dim": 80}, "head_dim 80"),
        ({"block_size": 96}, "block_size 96"),
        ({"dtype": torch.float64}, "float64"),
        ({"num_blocks": 10**5}, "100000 blocks"),
        ({"device": torch.device("meta")}, "not on meta"),
    ):
        assert told in (why_not(call._replace(**changed)) or "")
    layout, x = TokenLayout.build((4, 4, 8), 0, block_size=64), torch.zeros(1, 128, 1, 20, device=DEVICE, dtype=EXACT)
    with pytest.raises(RuntimeError, match="head_dim 20"):
        rectified_attention(x, x, x, layout, backend="triton")


@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
@pytest.mark.parametrize(("blocks", "block_size"), [(1, 64), (2, 64), (3, 64), (13, 64), (9, 128), (33, 64)])
def test_the_tree_is_that_of_the_stage(blocks, block_size, kind):
    """To the last token: both have the same bfloat16 features, and of equal ones the first go left."""
    points = torch.randn(3, blocks * block_size, 8, generator=torch.Generator().manual_seed(blocks))
    points = {"normal": points, "few values": points.round(), "equal": torch.zeros_like(points)}[kind]
    points = points.to(DEVICE, torch.bfloat16)
    got = sorting.k_d_order(points, block_size)
    assert torch.equal(got.long(), arrange.k_d_order(points, block_size))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_directions_are_those_of_the_stage(head_dim):
    generator = torch.Generator().manual_seed(0)
    long = torch.linspace(3, 0.3, head_dim)  # a spectrum whose directions are far apart
    q, k = ((torch.randn(3, 900, head_dim, generator=generator) * long.square() + 1).to(DEVICE) for _ in "qk")
    given = arrange.moments(q, k, head_dim**-0.5)
    want, got = arrange.directions(given), sorting.directions(given)
    seen, exact = (torch.cat([q, k], -1) @ w for w in (got, want))
    seen, exact = (x - x.mean(1, keepdim=True) for x in (seen, exact))
    sign = (seen * exact).sum(1, keepdim=True).sign()
    assert ((sign * seen - exact).norm(dim=1) <= 0.02 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_projections_are_those_of_the_stage(head_dim):
    layout, (q, k, _), _ = inputs((3, 7, 11), 17, True, 64, head_dim)
    w = torch.randn(4, 2 * head_dim, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, q.dtype)
    shift = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = sorting.project(q, k, layout.tiled, w, shift)
    both = torch.cat([x[:, layout.tiled].transpose(1, 2).flatten(0, 1) for x in (q, k)], -1).double()
    want = both @ w.double() - shift.double()
    torch.testing.assert_close(got.double(), want, rtol=2.0**-7, atol=1e-3)  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [RAGGED, CASES[3]])
def test_order_content_is_the_oracle(case, mode):
    shape = case[:-1]
    qkv, valid = inputs(*case)[1:]
    layout = TokenLayout.build(*shape, "content")
    config = SparseConfig(sparsity=0.6, rectify=mode, order="content", neighbours=False)
    options = {"text_mask": valid, "return_stats": True}
    out, stats = rectified_attention(*qkv, layout, config, backend="triton", **options)
    options |= {"block_mask": stats.block_mask}
    want, oracle = rectified_attention(*qkv, layout, config, backend="reference", **options)
    assert torch.equal(stats.token_order, oracle.token_order)
    mask = seen(layout, valid)
    heads_first = [x.transpose(1, 2) for x in qkv]
    exact = scaled_dot_product_attention(*(x.double() for x in heads_first), attn_mask=mask)
    own = (scaled_dot_product_attention(*heads_first, attn_mask=mask).double() - exact).abs().max()
    same = (stats.compensated == oracle.compensated).all(-1)
    assert same.all() or mode == "ipar+gapr"
    error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
    tiled = error.gather(2, stats.token_order)[same.repeat_interleave(layout.block_size, -1)]
    worst = torch.cat([tiled, error[..., layout.isolated.to(DEVICE)].flatten()]).max()
    assert worst <= 2 * own + (torch.finfo(out.dtype).eps + 2.0**-16) * want.abs().max()
