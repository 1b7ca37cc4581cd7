"""The Triton and FlashAttention-4 backends on a CUDA GPU: `pytest -m gpu`; the latter's cases need flash-attn-4."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cases import MODES, STRIDED, kernel_budget, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.backends import BACKENDS, Call
from rectified_spaattn.lab.bench.shapes import SHAPES

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA GPU")]

NAMES = ("triton", "fa4")
HALVES = (torch.float16, torch.bfloat16)
# grid, text, text first, block size, head_dim, batch: every tail there is, up to a few hundred blocks
CASES = [
    ((4, 16, 16), 40, False, 64, 64, 2),
    ((5, 9, 11), 17, True, 64, 128, 2),
    ((3, 16, 24), 0, False, 128, 128, 1),
    ((7, 13, 29), 300, False, 128, 128, 2),
    ((6, 24, 40), 226, True, 128, 64, 3),
    ((9, 30, 52), 130, False, 128, 128, 1),
]


def inputs(case, dtype, heads=3):
    *shape, head_dim, batch = case
    layout = TokenLayout.build(*shape)
    qkv = [x.cuda() for x in video_like(0, batch, layout.sequence, heads, head_dim, dtype)]
    valid = torch.rand(batch, layout.text, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[0] = True
    return layout, qkv, valid.cuda()


def require(name, layout, head_dim, dtype):
    """Skips what the backend says it cannot run here; what it says must then also be raised."""
    call = Call(torch.device("cuda"), dtype, head_dim, layout.block_size, layout.num_blocks)
    reason = BACKENDS[name].why_not(call)
    if reason is not None:
        x = torch.zeros(1, layout.sequence, 1, head_dim, dtype=dtype, device="cuda")
        with pytest.raises(RuntimeError, match=name):
            rectified_attention(x, x, x, layout, backend=name)
        pytest.skip(reason)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_twice_that_of_sdpa(name, case, dtype, mode):
    layout, qkv, valid = inputs(case, dtype)
    require(name, layout, case[4], dtype)
    for x in qkv[1:]:  # what padding holds must not matter
        x[:, layout.isolated[layout.leftover :]] = x[:, layout.isolated[layout.leftover :]].masked_fill(
            ~valid[..., None, None], torch.nan
        )
    clean = [qkv[0], *(x.nan_to_num(0.0) for x in qkv[1:])]
    budget = kernel_budget(clean, layout, valid)

    config = SparseConfig(sparsity=0.7, rectify=mode, neighbours=False)
    out, stats = rectified_attention(*qkv, layout, config, text_mask=valid, return_stats=True, backend=name)
    assert stats.backend == name
    given = {"text_mask": valid, "block_mask": stats.block_mask, "backend": "reference", "return_stats": True}
    want, oracle = rectified_attention(*clean, layout, config, **given)
    # a gain that equals its error up to rounding may fall on either side: such query blocks are not compared
    same = (stats.compensated == oracle.compensated).all(-1)
    assert same.float().mean() > 0.99
    error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
    tiled = error[..., layout.tiled.cuda()][same.repeat_interleave(layout.block_size, -1)]
    worst = torch.cat([tiled, error[..., layout.isolated.cuda()].flatten()]).max()
    assert worst <= budget * want.abs().max()


@pytest.mark.parametrize("mode", ["none", "ipar", "row"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_order_content_is_the_reference(name, case, mode):
    (*shape, head_dim, _), dtype = case, torch.bfloat16
    qkv, valid = inputs(case, dtype)[1:]
    layout = TokenLayout.build(*shape, "content")
    require(name, layout, head_dim, dtype)
    budget = kernel_budget(qkv, layout, valid)
    config = SparseConfig(sparsity=0.7, rectify=mode, neighbours=False)
    out, stats = rectified_attention(*qkv, layout, config, text_mask=valid, return_stats=True, backend=name)
    given = {"text_mask": valid, "block_mask": stats.block_mask, "backend": "reference", "return_stats": True}
    want, oracle = rectified_attention(*qkv, layout, config, **given)
    assert torch.equal(stats.token_order, oracle.token_order)
    assert (out.double() - want).abs().max() <= budget * want.abs().max()


@pytest.mark.parametrize("stride", ["[B, H, S, D] in memory", "qkv packed", "every other element of a wider tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, stride):
    layout, qkv, valid = inputs(CASES[3], torch.bfloat16)
    require(name, layout, 128, torch.bfloat16)
    strided = [STRIDED[stride](x.cpu()).cuda() if stride != "qkv packed" else STRIDED[stride](x) for x in qkv]
    plain, other = (
        rectified_attention(
            *each, layout, SparseConfig(sparsity=0.6, order="gilbert", neighbours=True), text_mask=valid, backend=name
        )
        for each in (qkv, strided)
    )
    assert torch.equal(plain, other)


@pytest.mark.parametrize("name", ["torch", *NAMES])
def test_tensors_need_not_be_on_the_current_gpu(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layout, qkv, valid = inputs(CASES[3], torch.bfloat16)
    require(name, layout, 128, torch.bfloat16)
    config = SparseConfig(sparsity=0.6, order="gilbert", neighbours=True)
    want = rectified_attention(*qkv, layout, config, text_mask=valid, backend=name)
    elsewhere = (x.to("cuda:1") for x in qkv)
    got = rectified_attention(*elsewhere, layout, config, text_mask=valid.to("cuda:1"), backend=name)
    assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.to("cuda:0"), want)


@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_one_cuda_graph_and_copies_nothing_to_the_host(name, order):
    (*shape, head_dim, _) = case = CASES[4 if name == "triton" else 3]
    qkv, valid = inputs(case, torch.bfloat16)[1:]
    layout = TokenLayout.build(*shape, order)
    require(name, layout, head_dim, torch.bfloat16)
    config = SparseConfig(sparsity=0.7, order=order, neighbours=order != "content")

    def call():
        return rectified_attention(*qkv, layout, config, text_mask=valid, backend=name)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            first = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, first)
    # other numbers in the same place give their own result
    qkv[0].copy_(qkv[0].flip(1))
    graph.replay()
    assert torch.equal(captured, call())
    assert not torch.equal(captured, first)

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
    names = {event.key for event in profiled.key_averages()}
    assert any("kernel" in each for each in names)
    assert not [each for each in names if "DtoH" in each or each in ("aten::item", "aten::_local_scalar_dense")]


@pytest.mark.parametrize("order", ["gilbert", "content"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_at_hunyuan_videos_shape(name, order):
    shape = SHAPES["hunyuan-video"]
    layout = shape.layout(128, order)
    require(name, layout, 128, torch.bfloat16)
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = SparseConfig(sparsity=0.8, top_p=0.0, neighbours=False)
    first = rectified_attention(q, k, v, layout, config, backend=name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = rectified_attention(q, k, v, layout, config, backend=name)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    print(f"\n{name}, {order}: {extra / 2**30:.2f} GiB")
    assert extra <= 3.0 * 2**30
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_32_bits_count(name):
    layout = TokenLayout.build((32, 45, 80), 256)
    require(name, layout, 128, torch.bfloat16)
    batch, heads = 5, 32  # 2.4e9 elements a tensor
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    q, k, v = (torch.randn(batch, layout.sequence, heads, 128, **draw) for _ in range(3))
    config = SparseConfig(sparsity=0.95, top_p=0.0, neighbours=False)
    out = rectified_attention(q, k, v, layout, config, backend=name)
    last = rectified_attention(*(x[-1:, :, -2:] for x in (q, k, v)), layout, config, backend=name)
    assert torch.equal(out[-1:, :, -2:], last)
