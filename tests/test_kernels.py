"""The Triton kernels against the stages and the reference: interpreted on a CPU, compiled where there is a GPU.

What sorts by content is in test_sorting_kernels.py. Each kind of shape meets each kind of rule, not every one with all.
"""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cases import STRIDED, kernel_budget, seen, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends.calls import Call
from rectified_spaattn.backends.triton import Partial, Prepared, why_not
from rectified_spaattn.backends.triton.attend import attend
from rectified_spaattn.backends.triton.directions import moments, of_errors
from rectified_spaattn.backends.triton.plan import decide, empty, select
from rectified_spaattn.backends.triton.tile import tile
from rectified_spaattn.config import RECTIFY, Rule
from rectified_spaattn.method import plan as method
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.method.pool import pool
from rectified_spaattn.method.residual import Directions, responses
from rectified_spaattn.method.select import select as select_stage
from rectified_spaattn.orders import blocks_of

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = torch.float32 if DEVICE.type == "cpu" else torch.float16  # the kernels take float32 in the interpreter alone
FEW = 1 if DEVICE.type == "cpu" else 2  # heads: interpreting takes time a program, compiling for one head a variant
DTYPES = (torch.float16, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)

# grid, text, text first, block size, head_dim
PLAIN = ((2, 8, 12), 40, False, 64, 64)  # no leftover tokens
RAGGED = ((2, 7, 11), 17, True, 64, 64)
LONG_TEXT = ((3, 5, 26), 70, False, 128, 64)  # with the leftover tokens more than a block
ALONE = ((2, 8, 8), 0, False, 64, 128)  # nothing is isolated
NO_BLOCK = ((2, 3, 5), 12, False, 64, 64)
NARROW = ((2, 7, 11), 17, True, 64, 96)  # tiles of 128 columns, of which some hold nothing
WIDE = ((1, 10, 20), 5, False, 64, 256)
CASES = {"plain": PLAIN, "ragged": RAGGED, "long text": LONG_TEXT, "alone": ALONE, "no block": NO_BLOCK}
CASES |= {"96": NARROW, "256": WIDE}


@pytest.fixture(autouse=True)
def gated_tail(monkeypatch):
    """A rule of the tests' own: what the modes do not combine."""
    monkeypatch.setitem(RECTIFY, "gated tail", Rule(gate="gain", tail=True))


def call(case, dtype=EXACT, batch=2, heads=2, scale=0.15, key_heads=None, **settings):
    """Some valid text of one sample is scattered, all of the other's is valid."""
    grid, text, text_first, block_size, head_dim = case
    layout = TokenLayout.build(grid, text, text_first)
    config = SparseConfig(block_size=block_size, **{"order": "gilbert", "sparsity": 0.6, **settings})
    qkv = [x.to(DEVICE) for x in video_like(0, batch, layout.sequence, heads, head_dim, dtype, key_heads)]
    valid = torch.ones(batch, text, dtype=torch.bool)
    valid[-1, ::3] = False
    valid[-1, text // 2 :] = False
    inputs = Inputs(*qkv, blocks_of(layout, config).on(DEVICE), config, valid.to(DEVICE), scale)
    return layout, inputs


def run(layout, inputs, backend="triton", **options):
    options = {"text_mask": inputs.text_mask, "scale": inputs.scale, "return_stats": True, **options}
    return rectified_attention(*inputs[:3], layout, inputs.config, backend=backend, **options)


def whole(halves):
    return halves.double().sum(0)


def in_blocks(x, blocks):
    # [B, S, H, D] -> [B, H, nb, b, D]
    return x[:, blocks.tiled].transpose(1, 2).unflatten(2, (blocks.num_blocks, blocks.block_size))


def staged(inputs):
    """The plan by the stages in float64."""
    inputs = inputs._replace(**{name: getattr(inputs, name).double() for name in "qkv"})
    tiled = (in_blocks(x, inputs.blocks) for x in inputs[:3])
    return method.decide(inputs, *tiled, inputs.k[:, inputs.blocks.isolated].transpose(1, 2))


# every shape, and every set of statistics that a rule asks for
POOLED = [(case, "row+slope") for case in ("plain", "long text", "96")]
POOLED += [
    ("ragged", "gated tail"),
    ("alone", "ipar+gapr"),
    ("alone", "row"),
    ("no block", "row+slope"),
    ("plain", "ipar"),
]


@pytest.mark.parametrize(("case", "mode"), POOLED)
def test_tile_orders_and_pools_in_one_pass(case, mode):
    dtype = DTYPES[mode in ("ipar", "row")]
    inputs = call(CASES[case], dtype, heads=FEW if case in ("96", "long text") else 2, rectify=mode)[1]
    (q, k, v, blocks, config, *_), keep = inputs, inputs.valid[:, None, :, None]
    for x in (k, v):  # whatever padding holds, it must not get further than here
        for sample in range(2):
            x[sample, blocks.isolated[~inputs.valid[sample]]] = torch.nan
    tiled = tile(inputs)
    nb, b = blocks.num_blocks, blocks.block_size
    for x, block_ordered in ((q, tiled.q[:, :, : nb * b]), (k, tiled.k), (v, tiled.v)):
        assert torch.equal(block_ordered.unflatten(2, (nb, b)), in_blocks(x, blocks))
    isolated = blocks.isolated.numel()
    assert torch.equal(tiled.q[:, :, nb * b :][:, :, :isolated], q[:, blocks.isolated].transpose(1, 2))
    for x, tail in ((k, tiled.k_tail), (v, tiled.v_tail)):
        assert torch.equal(tail[:, :, :isolated], x[:, blocks.isolated].transpose(1, 2).masked_fill(~keep, 0))
        assert not tail[:, :, isolated:].any()
    assert torch.equal(tiled.tail_bias[:, :isolated] == 0, inputs.valid)
    assert (tiled.tail_bias[:, isolated:] == -math.inf).all()
    for sample in range(2):
        places = inputs.valid[sample].nonzero()
        assert tiled.tail_end[sample] == (places.max() + 1 if len(places) else 0)
    want = pool(*(in_blocks(x.double(), blocks) for x in (q, k, v)), config.rule)
    for got, exact in zip(tiled.pooled, want, strict=True):
        assert (got is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(whole(got), exact, rtol=2e-5, atol=1e-6)
    assert (tiled.responses is not None) == (config.rule.choice == "error" and nb > 0)
    if tiled.responses is not None:
        found = of_errors(moments(q, k, blocks.tiled, inputs.scale), k.shape[2], inputs.scale, dtype)
        seen = Directions(*(x.double() for x in found))
        want_responses = responses(*(in_blocks(x.double(), blocks) for x in (q, k, v)), seen)
        for got, exact in zip(tiled.responses, want_responses, strict=True):
            # directions and what is seen in them are rounded to the inputs' dtype, of which two make a product
            rounding = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(whole(got), exact, rtol=rounding, atol=rounding * exact.abs().max().item())
    for got, exact in ((tiled.k_pool, want.k), (tiled.v_pool, want.v)):
        assert (got is not None) == config.rule.tail
        if got is not None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got[:, :, :nb].double(), exact, rtol=eps, atol=1e-6)
            assert not got[:, :, nb:].any()


@pytest.fixture(scope="module")
def contiguous():
    layout, inputs = call(RAGGED, rectify="row")
    return layout, inputs, run(layout, inputs)[0]


@pytest.mark.parametrize("stride", STRIDED)
def test_any_strides(contiguous, stride):
    layout, inputs, want = contiguous
    strided = inputs._replace(**{name: STRIDED[stride](getattr(inputs, name)) for name in "qkv"})
    if "expanded" in stride:
        whole = inputs._replace(**{name: getattr(strided, name).contiguous() for name in "qkv"})
        want = run(layout, whole)[0]
    assert torch.equal(want, run(layout, strided)[0])


# every shape with pooled text and with all that a rule may want, every mode with one shape
PLANS = [("plain", "none"), ("ragged", "ipar"), ("long text", "ipar+gapr"), ("ragged", "row")]
PLANS += [("ragged", "row+slope"), ("96", "row+slope")]
PLANS += [(case, "query+slope") for case in ("ragged", "long text", "alone", "96")]
PLANS += [("96", "ipar+gapr"), ("256", "gated tail")]
PLANS += [(case, mode) for case in ("plain", "ragged", "long text", "alone") for mode in ("pooled", "gated tail")]


@pytest.mark.parametrize(("case", "mode"), PLANS)
def test_plan_is_that_of_the_stages(case, mode):
    place = {"neighbours": case == "long text", "first_frame": case == "ragged"}
    size = {"heads": 2 if case == "plain" else FEW, "batch": 1 if case in ("alone", "96", "256") else 2}
    inputs = call(CASES[case], **size, scale=0.2, top_p=0.5, rectify=mode, **place)[1]
    tiled = tile(inputs)
    choices, rectification, lists = decide(inputs, tiled)
    want, want_rectification = staged(inputs)
    torch.testing.assert_close(choices.probability.double(), want.probability, rtol=2e-4, atol=1e-6)
    assert torch.equal(choices.block_mask, want.block_mask)
    assert torch.equal(choices.compensated, want.compensated)
    for r in (choices.r, rectification.r):
        torch.testing.assert_close(r.double(), want.r, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(rectification.c.double(), want_rectification.c, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(choices.probability.sum(-1), torch.ones_like(choices.r))
    assert (rectification.tail is not None) == inputs.config.rule.tail
    if rectification.tail is not None:
        bias = rectification.tail.bias
        torch.testing.assert_close(bias.double(), want_rectification.tail.bias, rtol=2e-4, atol=1e-5)
        assert torch.equal(bias.isfinite(), choices.compensated)
    slope, exact = rectification.slope, want_rectification.slope
    assert (slope is not None, slope is None) == (inputs.config.rule.slope, exact is None)
    if slope is not None:  # keys and values are rounded to the inputs' dtype once more
        eps = torch.finfo(EXACT).eps
        torch.testing.assert_close(slope.double(), exact, rtol=0, atol=max(eps, 2e-5) * exact.abs().max().item())
    check_lists(lists, choices.block_mask)


def check_lists(lists, block_mask):
    nb = block_mask.shape[-1]
    assert torch.equal(lists.counts[..., :nb], block_mask.sum(-1).int())
    assert (lists.counts[..., nb:] == nb).all()
    assert lists.counts.dtype == lists.indices.dtype == torch.int32
    counts, indices = lists.counts[..., :nb].flatten(), lists.indices[..., :nb, :].flatten(0, 2)
    for count, index, row in zip(counts, indices, block_mask.flatten(0, 2), strict=True):
        assert torch.equal(index[:count], row.nonzero()[:, 0].int())
    of_isolated = lists.indices[..., nb:, :]
    assert torch.equal(of_isolated, torch.arange(nb, device=DEVICE).int().expand_as(of_isolated))


@pytest.mark.parametrize(
    ("blocks", "sparsity", "top_p"),
    [
        *((1, 0.9, 0.3), (5, 0.0, 0.3), (5, 0.5, 0.9), (5, 0.9, 1.0)),
        *((13, 0.5, 0.0), (13, 0.5, 0.3), (13, 0.8, 0.9), (18, 0.9, 0.97)),
    ],
)
def test_selection_is_that_of_a_stable_sort_however_many_ties(blocks, sparsity, top_p):
    generator = torch.Generator().manual_seed(blocks)
    # eighths, so that sums are exact and many are equal; rows of zeros, of no number, with everything in one block
    weight = torch.randint(0, 3, (1, FEW, blocks, blocks + 1), generator=generator).float().to(DEVICE)
    weight[..., -1] = 1
    if blocks > 4:
        weight[0, 0, 0, :-1] = 0
        weight[0, 0, 1, 0] = 1000
        weight[0, 0, 2, 3] = torch.nan
        weight[0, 0, 4, -1] = torch.inf
    probability = weight / weight.sum(-1, keepdim=True)
    odd = ~probability.sum(-1).isfinite()
    inputs = call(((blocks, 1, 64), 0, False, 64, 64), heads=FEW, batch=1, sparsity=sparsity, top_p=top_p)[1]
    inputs = inputs._replace(config=inputs.config.replace(rectify="ipar"))
    choices, bias, lists = empty(inputs, tile(inputs))
    choices.probability.copy_(weight.log())
    select(inputs, choices, bias, lists)
    torch.testing.assert_close(choices.probability[~odd], probability[~odd])
    want = select_stage(choices.probability, inputs.blocks, inputs.config)
    # top-p at exactly the sum of the blocks before may fall on either side of it in float32
    ranked = choices.probability[..., :-1].sort(-1, descending=True).values
    sums = choices.probability[..., -1:] + ranked.cumsum(-1)
    sure = ((sums - top_p).abs() > 1e-6).all(-1) | odd | (top_p == 1)
    assert sure.float().mean() > 0.5
    assert torch.equal(choices.block_mask[sure], want[sure])
    assert choices.block_mask[odd].all()
    assert choices.block_mask.all() or top_p < 1
    assert torch.equal(choices.compensated, ~choices.block_mask)
    check_lists(lists, choices.block_mask)


def test_a_block_mask_takes_the_place_of_selection():
    layout, inputs = call(PLAIN, rectify="ipar+gapr", sparsity=0.9)
    nb = inputs.blocks.num_blocks
    block_mask = torch.rand(2, 2, nb, nb, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.4
    block_mask[0, 0, 0] = False  # a row without any block has its isolated keys
    out, stats = run(layout, inputs, block_mask=block_mask)
    want, exact = run(layout, inputs, "reference", block_mask=block_mask)
    assert torch.equal(stats.block_mask, block_mask)
    assert torch.equal(stats.compensated, exact.compensated)
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


def test_a_query_block_without_any_key_is_not_a_number():
    layout, inputs = call(ALONE, rectify="ipar+gapr")
    nb = inputs.blocks.num_blocks
    block_mask = torch.eye(nb, dtype=torch.bool, device=DEVICE).expand(2, 2, nb, nb).clone()
    block_mask[1, 1, 0] = False
    out, _ = run(layout, inputs, block_mask=block_mask)
    hit = out[:, inputs.blocks.tiled].unflatten(1, (nb, -1)).isnan().all(-1).all(2)  # [B, nb, H]
    assert hit.nonzero().tolist() == [[1, 0, 1]]
    assert out.isnan().sum() == inputs.blocks.block_size * out.shape[-1]


def test_row_needs_no_critical_block():
    layout, inputs = call(ALONE, rectify="row")
    nb = inputs.blocks.num_blocks
    block_mask = torch.zeros(2, 2, nb, nb, dtype=torch.bool, device=DEVICE)
    (out, _), (want, _) = (run(layout, inputs, name, block_mask=block_mask) for name in ("triton", "reference"))
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


def error_of(out, want):
    return (out.double() - want).abs().max().item()


@pytest.mark.parametrize(
    ("case", "mode", "dtype"),
    [
        *(("plain", "ipar+gapr", 0), ("plain", "row", 1), ("ragged", "row", 0), ("ragged", "ipar+gapr", 1)),
        *(("long text", "ipar+gapr", 0), ("long text", "row", 1), ("alone", "row", 0), ("no block", "row", 1)),
        *(
            ("96", "ipar+gapr", 0),
            ("96", "row+slope", 1),
            ("96", "query+slope", 0),
            ("256", "query+slope", 0),
            ("plain", "query+slope", 0),
            ("ragged", "query+slope", 1),
            ("alone", "query+slope", 0),
            ("no block", "query+slope", 1),
        ),
    ],
)
def test_error_is_at_most_twice_that_of_sdpa(case, mode, dtype):
    heads = 2 if mode == "ipar+gapr" and case != "96" else FEW
    batch = 1 if "slope" in mode and case != "ragged" else 2
    layout, inputs = call(CASES[case], DTYPES[dtype], batch, heads, rectify=mode, scale=None)
    out, stats = run(layout, inputs)
    want, exact = run(layout, inputs, "reference", block_mask=stats.block_mask)
    assert out.dtype == DTYPES[dtype]
    assert torch.equal(stats.compensated, exact.compensated)
    assert error_of(out, want) <= kernel_budget(inputs[:3], layout, inputs.text_mask) * want.abs().max().item()


def test_all_blocks_kept_is_full_attention():
    layout, inputs = call(RAGGED, batch=1, heads=FEW, sparsity=0.0, scale=None)
    out, _ = run(layout, inputs)
    exact = (x.double().transpose(1, 2) for x in inputs[:3])
    want = scaled_dot_product_attention(*exact, attn_mask=seen(layout, inputs.text_mask)).transpose(1, 2)
    assert error_of(out, want) < 1e-3


@pytest.mark.parametrize(
    ("case", "mode"),
    [("long text", "ipar+gapr"), ("ragged", "row"), ("ragged", "query+slope"), ("alone", "gated tail")],
)
def test_log_sum_exp_and_a_partial_result_taken_up(case, mode):
    """LSE is that of the keys attended to; attention over the listed blocks may be done elsewhere."""
    inputs = call(CASES[case], heads=FEW, rectify=mode)[1]
    tiled, scale = tile(inputs), inputs.scale
    choices, rectification, lists = decide(inputs, tiled)
    prepared = Prepared(tiled, lists, rectification)
    out, lse = attend(inputs, prepared)
    nb, b, rows = inputs.blocks.num_blocks, inputs.blocks.block_size, tiled.q.shape[2]
    tail_rows = rows - nb * b
    logits = scale * tiled.q.double() @ torch.cat([tiled.k, tiled.k_tail], 2).double().transpose(-1, -2)
    listed = torch.cat([choices.block_mask, choices.block_mask.new_ones(2, FEW, tail_rows // b, nb)], 2)
    listed = listed.repeat_interleave(b, 2).repeat_interleave(b, 3)
    to_blocks = logits[..., : nb * b].masked_fill(~listed, -math.inf)
    to_tail = logits[..., nb * b :] + tiled.tail_bias.double()[:, None, None]
    every = [to_blocks, to_tail]
    if rectification.tail is not None:
        k, bias = rectification.tail.k[:, :, :nb].double(), rectification.tail.bias.double()
        queries = scale * tiled.q[:, :, : nb * b].double()
        to_pool = queries @ k.transpose(-1, -2) + bias.repeat_interleave(b, 2)
        if inputs.config.rule.queries:
            to_pool += (0.5 * queries.square() @ whole(tiled.pooled.k_var).transpose(-1, -2)).clamp(max=2)
        every.append(torch.cat([to_pool, to_pool.new_full((*to_pool.shape[:2], tail_rows, nb), -math.inf)], 2))
    torch.testing.assert_close(lse.double(), torch.cat(every, -1).logsumexp(-1), rtol=1e-3, atol=1e-3)
    partial = Partial((to_blocks.softmax(-1) @ tiled.v.double()).to(out.dtype), to_blocks.logsumexp(-1).float())
    resumed, again = attend(inputs, prepared, partial)
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
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        ("plain", "row"),
        ("ragged", "ipar+gapr"),
        ("long text", "row"),
        ("alone", "ipar+gapr"),
        ("no block", "row"),
        ("ragged", "query+slope"),
    ],
)
def test_every_output_is_written_and_the_same_bits_come_twice(case, mode):
    assert torch.empty(3).isnan().all()
    batch = 1 if case in ("plain", "long text") else 2
    layout, inputs = call(CASES[case], batch=batch, heads=FEW, rectify=mode, neighbours=True)
    first, second = (run(layout, inputs) for _ in range(2))
    assert first[0].isfinite().all()
    assert torch.equal(first[0], second[0])
    for name in ("block_mask", "compensated", "probability", "r"):
        one, other = getattr(first[1], name), getattr(second[1], name)
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_why_not():
    takes = Call(DEVICE, EXACT, 64, 64)
    assert why_not(takes) is None
    for changed, told in (
        ({"head_dim": 80}, "head_dim 80, the kernels take 64, 96, 128 and 256"),
        ({"block_size": 96}, "block_size 96"),
        ({"dtype": torch.float64}, "float64"),
        ({"num_blocks": 10**5}, "100000 blocks"),
        ({"device": torch.device("meta")}, "not on meta"),
    ):
        assert told in (why_not(takes._replace(**changed)) or "")
    layout, x = TokenLayout.build((4, 4, 8)), torch.zeros(1, 128, 1, 20, device=DEVICE, dtype=EXACT)
    with pytest.raises(RuntimeError, match="head_dim 20"):
        rectified_attention(x, x, x, layout, backend="triton")
