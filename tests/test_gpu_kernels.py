"""The Triton and FlashAttention-4 backends on a CUDA GPU: `make gpu-test`; the latter's cases need flash-attn-4.

Compiling is what takes time. A kernel is compiled anew for a dtype, a block size and a head size, for the next power of
two above the number of blocks, and for counts that are 1 or a multiple of 16. So small cases have 3 heads and 17 to 31
blocks, and each kind of case, of mode and of dtype meets the others without all being combined.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import rectified_spaattn as rsa
from cases import STRIDED, Call, kernel_budget, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.backends import Call as BackendCall

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA GPU")]

NAMES = ("triton", "fa4")
FP16, BF16 = torch.float16, torch.bfloat16
# grid, text, text first, block size, head_dim, batch; "grouped": a key head for 2 of queries; "apart": causal text
CASES = {
    "64x64": ((4, 17, 16), 40, False, 64, 64, 2),  # no leftover tokens
    "64x128": ((9, 10, 13), 17, True, 64, 128, 2),  # 18 of them
    "128x64": ((5, 20, 24), 226, True, 128, 64, 3),
    "128x128": ((7, 13, 29), 300, False, 128, 128, 2),
    "128x128 alone": ((3, 24, 32), 0, False, 128, 128, 1),  # nothing is isolated
    "128x128 long": ((9, 30, 52), 130, False, 128, 128, 1),  # 109 blocks
    "128x96": ((7, 13, 29), 300, False, 128, 96, 2),
    "128x256": ((7, 13, 29), 300, False, 128, 256, 1),
    "64x256": ((4, 17, 16), 40, False, 64, 256, 1),
    "128x128 grouped": ((7, 13, 29), 300, False, 128, 128, 2),
    "128x128 grouped, apart": ((7, 13, 29), 300, True, 128, 128, 2),
}
TRITON = [
    *(("128x128", BF16, mode) for mode in ("none", "pooled", "ipar", "ipar+gapr", "row")),
    *(("128x128", FP16, mode) for mode in ("ipar+gapr", "row")),
    *(("64x64", FP16, mode) for mode in ("pooled", "ipar+gapr", "row")),
    *(("64x64", BF16, "row"), ("64x128", FP16, "ipar+gapr"), ("64x128", BF16, "pooled"), ("64x128", BF16, "row")),
    *(("128x64", BF16, "ipar"), ("128x64", BF16, "row"), ("128x64", FP16, "ipar+gapr")),
    *(("128x128 alone", BF16, mode) for mode in ("pooled", "ipar+gapr", "row")),
    *(("128x128 long", BF16, mode) for mode in ("ipar+gapr", "row")),
    *(("128x128 long", BF16, "row+slope"), ("128x128 alone", FP16, "row+slope"), ("64x64", BF16, "row+slope")),
    *(("64x128", FP16, "row+slope"), ("128x64", BF16, "row+slope")),
    *(("128x128 long", BF16, "query+slope"), ("128x128 alone", FP16, "query+slope"), ("64x64", BF16, "query+slope")),
    *(("64x128", FP16, "query+slope"), ("128x64", BF16, "query+slope"), ("128x96", BF16, "query+slope")),
    *(("128x96", BF16, "row"), ("128x96", FP16, "ipar+gapr"), ("128x96", BF16, "row+slope")),
    *(
        ("128x256", BF16, "row"),
        ("128x256", FP16, "ipar+gapr"),
        ("128x256", BF16, "query+slope"),
        ("64x256", BF16, "row"),
    ),
    *(("128x128 grouped", BF16, mode) for mode in ("pooled", "ipar+gapr", "row", "row+slope", "query+slope")),
    *(("128x128 grouped, apart", BF16, "row"), ("128x128 grouped, apart", FP16, "ipar+gapr")),
]
FA4 = [
    *(("128x128", BF16, mode) for mode in ("none", "ipar+gapr", "row")),
    *(("128x128", FP16, "row"), ("128x64", BF16, "row"), ("128x64", FP16, "ipar+gapr")),
    *(("128x128 alone", BF16, "row"), ("128x128 long", BF16, "row"), ("64x64", BF16, "row")),
    *(("128x128", FP16, "row+slope"), ("128x128 long", BF16, "row+slope"), ("128x64", BF16, "row+slope")),
    *(("128x128", FP16, "query+slope"), ("128x128 long", BF16, "query+slope"), ("128x64", BF16, "query+slope")),
    *(("128x96", BF16, "row"), ("128x96", BF16, "query+slope"), ("128x256", BF16, "row")),
    *(("128x128 grouped", BF16, mode) for mode in ("ipar+gapr", "row", "query+slope")),
    *(("128x128 grouped, apart", BF16, "row"), ("128x128 grouped, apart", FP16, "ipar+gapr")),
]


def call_of(case, dtype, mode="ipar+gapr", order="gilbert", heads=3, **settings):
    grid, text, text_first, block_size, head_dim, batch = CASES[case]
    heads, key_heads = (4, 2) if "grouped" in case else (heads, heads)
    layout = TokenLayout.build(grid, text, text_first, text_sees="causal text" if "apart" in case else "all")
    config = SparseConfig(sparsity=0.7, rectify=mode, order=order, block_size=block_size, **settings)
    qkv = [x.cuda() for x in video_like(0, batch, layout.sequence, heads, head_dim, dtype, key_heads)]
    valid = torch.rand(batch, layout.text, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[0] = True
    return Call(layout, config, qkv, {"text_mask": valid.cuda()})


def require(name, call):
    """Skips what the backend says it cannot run here; what it says must then also be raised."""
    q = call.qkv[0]
    reason = BACKENDS[name].why_not(
        BackendCall(q.device, q.dtype, q.shape[-1], call.config.block_size, call.blocks.num_blocks)
    )
    if reason is not None:
        with pytest.raises(RuntimeError, match=name):
            rectified_attention(*call.arguments, backend=name)
        pytest.skip(reason)


def run(name, call, **options):
    return rectified_attention(*call.arguments, **call.options, backend=name, return_stats=True, **options)


@pytest.mark.parametrize(
    ("name", "case", "dtype", "mode"), [*(("triton", *each) for each in TRITON), *(("fa4", *each) for each in FA4)]
)
def test_error_is_at_most_twice_that_of_sdpa(name, case, dtype, mode):
    call = call_of(case, dtype, mode)
    require(name, call)
    (q, *kv), (layout, config), valid = call.qkv, call.arguments[3:], call.options["text_mask"]
    for x in kv:  # what padding holds must not matter
        x[:, layout.text_places] = x[:, layout.text_places].masked_fill(~valid[..., None, None], torch.nan)
    out, stats = run(name, call)
    assert stats.backend == name
    call.qkv = [q, *(x.nan_to_num(0.0) for x in kv)]
    budget = kernel_budget(call.qkv, layout, valid)
    want, exact = run("reference", call, block_mask=stats.block_mask)
    # a gain that equals its error up to rounding may fall on either side: such query blocks are not compared
    same = (stats.compensated == exact.compensated).all(-1)
    assert same.float().mean() > 0.99
    error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
    blocks = call.blocks.on(q.device)
    tiled = error[..., blocks.tiled][same.repeat_interleave(config.block_size, -1)]
    worst = torch.cat([tiled, error[..., blocks.isolated].flatten()]).max()
    assert worst <= budget * want.abs().max()


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    [
        *(("triton", case, "row") for case in CASES),
        *(("triton", "128x128", "none"), ("triton", "64x64", "ipar")),
        *(("fa4", "128x128", "row"), ("fa4", "128x128 alone", "none"), ("fa4", "128x128 grouped", "row")),
        *((name, "128x128 long", "query+slope") for name in NAMES),
    ],
)
def test_order_content_is_the_reference(name, case, mode):
    call = call_of(case, BF16, mode, "content")
    require(name, call)
    budget = kernel_budget(call.qkv, call.layout, call.options["text_mask"])
    out, stats = run(name, call)
    assert stats.sorting == "triton"
    want, exact = run("reference", call, block_mask=stats.block_mask, token_order=stats.token_order)
    assert exact.sorting == ""
    assert (out.double() - want).abs().max() <= budget * want.abs().max()


@pytest.mark.parametrize(
    ("case", "dtype", "mode", "precision"),
    [
        ("128x128", BF16, "query+slope", "inputs"),
        ("128x128 grouped", BF16, "ipar+gapr", "fp8"),
        ("128x64", FP16, "none", "inputs"),
    ],
)
def test_gluon_and_plain_triton_agree(case, dtype, mode, precision, monkeypatch):
    """Gluon is not interpreted: on Hopper this file alone runs its kernels, and this test alone those they replace."""
    from rectified_spaattn.backends.triton import arch_of, attend, eight_bits

    call = call_of(case, dtype, mode, "content", precision=precision)
    q = call.qkv[0]
    if attend.why_not_gluon(arch_of(q.device), 128, q.shape[-1]) is not None:
        pytest.skip("Gluon does not run here")
    out, stats = run("triton", call)
    for module in (attend, eight_bits):
        monkeypatch.setattr(module, "why_not_gluon", lambda *of: "the test wants plain Triton")
    plain, _ = run("triton", call, block_mask=stats.block_mask, token_order=stats.token_order)
    budget = kernel_budget(call.qkv, call.layout, call.options["text_mask"])
    rounding = 0.02 if precision == "fp8" else 0.0  # of weights to 4 bits, against another largest
    assert not torch.equal(out, plain)
    assert (out.double() - plain.double()).abs().max() <= (budget + rounding) * plain.double().abs().max()


@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["128x128"])
def test_a_plan_attends_as_the_call_does(case, name, order):
    call = call_of(case, BF16, order=order)
    require(name, call)
    plan = rsa.plan(*call.arguments, **call.options, backend=name)
    assert torch.equal(rsa.attend(*call.qkv, plan), run(name, call)[0])
    later = [x.flip(1) for x in call.qkv]
    choices = {"block_mask": plan.block_mask, "token_order": plan.token_order}
    want = rectified_attention(*later, *call.arguments[3:], **call.options, **choices, backend=name)
    assert torch.equal(rsa.attend(*later, plan), want)


@pytest.mark.parametrize("stride", ["[B, H, S, D] in memory", "qkv packed", "every other element of a wider tensor"])
@pytest.mark.parametrize("case", ["128x128"])
def test_strides_do_not_matter(case, stride):
    """To the kernels that tile and project: not by a bit where the elements of a head lie side by side. Elsewhere sums
    may be taken in another order; the result is within the budget all the same.
    """
    call = call_of(case, BF16, "row", "content")
    plain = run("triton", call)[0]
    call.qkv = [STRIDED[stride](x) for x in call.qkv]
    out, stats = run("triton", call)
    if call.qkv[0].stride(-1) == 1:
        assert torch.equal(plain, out)
    assert (stats.token_order.sort().values == call.blocks.on(out.device).tiled.sort().values).all()
    want = run("reference", call, block_mask=stats.block_mask, token_order=stats.token_order)[0]
    budget = kernel_budget(call.qkv, call.layout, call.options["text_mask"])
    assert (out.double() - want).abs().max() <= budget * want.abs().max()


@pytest.mark.parametrize("name", ["torch", *NAMES])
@pytest.mark.parametrize("case", ["128x128"])
def test_tensors_need_not_be_on_the_current_gpu(case, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = call_of(case, BF16)
    require(name, call)
    want = run(name, call)[0]
    call.qkv = [x.to("cuda:1") for x in call.qkv]
    call.options["text_mask"] = call.options["text_mask"].to("cuda:1")
    got = run(name, call)[0]
    assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.to("cuda:0"), want)


@pytest.mark.parametrize(
    ("mode", "order"), [("ipar+gapr", "gilbert"), ("ipar+gapr", "content"), ("query+slope", "content")]
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["128x128", "128x128 grouped, apart"])
def test_a_call_is_one_cuda_graph_and_copies_nothing_to_the_host(case, name, mode, order):
    call = call_of(case, BF16, mode, order)
    require(name, call)
    qkv, side = call.qkv, torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            first = run(name, call)[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, call)[0]
    for _ in range(2):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, first)
    # other numbers in the same place give their own result
    qkv[0].copy_(qkv[0].flip(1))
    graph.replay()
    assert torch.equal(captured, run(name, call)[0])
    assert not torch.equal(captured, first)

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run(name, call)
    names = {event.key for event in profiled.key_averages()}
    assert any("_tile_kernel" in each for each in names)
    assert not [each for each in names if "DtoH" in each or each in ("aten::item", "aten::_local_scalar_dense")]


# --- one process has the GPU to itself


def video_call(batch, heads, sparsity, order="content", generator=None, mode="row"):
    """HunyuanVideo's tokens: 900 blocks."""
    layout = TokenLayout.build((32, 45, 80), 256)
    draw = {"device": "cuda", "dtype": BF16, "generator": generator}
    qkv = [torch.randn(batch, layout.sequence, heads, 128, **draw) for _ in "qkv"]
    return Call(layout, SparseConfig(sparsity=sparsity, top_p=0.0, order=order, rectify=mode), qkv)


@pytest.mark.large
@pytest.mark.parametrize(("mode", "order"), [("row", "gilbert"), ("row", "content"), ("row+slope", "content")])
@pytest.mark.parametrize("name", NAMES)
def test_memory_at_hunyuan_videos_shape(name, mode, order):
    call = video_call(1, 24, 0.8, order, mode=mode)
    require(name, call)
    first = run(name, call)[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = rectified_attention(*call.arguments, backend=name)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    print(f"\n{name}, {mode}, {order}: {extra / 2**30:.2f} GiB")
    assert extra <= 3.0 * 2**30
    assert torch.equal(first, second)


@pytest.mark.large
@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("name", NAMES)
def test_shared_key_heads_are_not_repeated_in_memory(name, order):
    """Of tiled keys and values a quarter is left where 4 query heads share a key head.

    triton needs most while they, the tiled queries and the output are there: 1 + 2 + 1 times the queries' memory, and
    1 + 2/4 + 1 where keys are shared. So does fa4 with the result over listed blocks in the output's place; but then it
    has that, the tiled queries and the output: 1 + 1 + 1, which is more where keys are shared.
    """
    call, extra = video_call(1, 32, 0.9, order), {}
    q, k, v = call.qkv
    require(name, call)
    shared = (q, k[:, :, ::4].contiguous(), v[:, :, ::4].contiguous())
    for which, qkv in (("repeated", (q, k, v)), ("shared", shared)):
        arguments = (*qkv, *call.arguments[3:])
        rectified_attention(*arguments, backend=name)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rectified_attention(*arguments, backend=name)
        torch.cuda.synchronize()
        extra[which] = torch.cuda.max_memory_allocated() - before
    print(f"\n{name}, {order}: " + ", ".join(f"{which} {size / 2**30:.2f} GiB" for which, size in extra.items()))
    saved = {"triton": 4 - 2.5, "fa4": 4 - 3}[name] * q.nbytes
    assert extra["repeated"] - extra["shared"] >= 0.95 * saved


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_32_bits_count(name):
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    call = video_call(5, 32, 0.95, generator=torch.Generator("cuda").manual_seed(0))  # 2.4e9 elements a tensor
    require(name, call)
    out = rectified_attention(*call.arguments, backend=name)
    last = rectified_attention(*(x[-1:, :, -2:] for x in call.qkv), *call.arguments[3:], backend=name)
    assert torch.equal(out[-1:, :, -2:], last)
