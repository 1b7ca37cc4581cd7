"""The torch backend and the seam on a CUDA GPU: `make gpu-test`."""

from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from cases import MODES, Call, seen, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

CASES = [
    ((4, 16, 16), 40, False, 64, 64),
    ((5, 9, 11), 17, True, 64, 128),
    ((3, 16, 24), 0, False, 128, 128),
    ((2, 3, 5), 12, False, 64, 64),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# every case with every mode, every mode with every dtype
TRIPLES = [(CASES[i], MODES[j], DTYPES[(i + j) % 3]) for i, j in product(range(4), range(5))]


def call_of(case, dtype, mode="ipar+gapr", order="gilbert", **settings):
    grid, text, text_first, block_size, head_dim = case
    layout = TokenLayout.build(grid, text, text_first)
    config = SparseConfig(rectify=mode, order=order, block_size=block_size, **{"sparsity": 0.7, **settings})
    qkv = [x.cuda() for x in video_like(0, 2, layout.sequence, 3, head_dim, dtype)]
    mask = torch.arange(text)[None] < torch.tensor([text, text // 3])[:, None]
    return Call(layout, config, qkv, {"text_mask": mask.cuda()})


def run(call, backend="torch", **options):
    return rectified_attention(*call.arguments, **call.options, backend=backend, return_stats=True, **options)


def dense(qkv, call):
    mask = seen(call.layout, call.options["text_mask"])
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(("case", "mode", "dtype"), TRIPLES)
def test_error_is_of_the_size_of_sdpas_own(case, mode, dtype):
    call = call_of(case, dtype, mode)
    exact_dense = dense([x.double() for x in call.qkv], call)
    sdpa_error = (dense(call.qkv, call).double() - exact_dense).abs().max() / exact_dense.abs().max()
    out, stats = run(call)
    # bfloat16 and float16 inputs are exact in float64, so the reference plans on the same numbers
    want, exact = run(call, "reference", block_mask=stats.block_mask)
    # a gain that equals its error up to rounding may fall on either side: such query blocks are not compared
    same = (stats.compensated == exact.compensated).all(-1)  # [B, H, nb]
    assert same.float().mean() > 0.99 or not same.numel()
    error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
    blocks = call.blocks.on(out.device)
    tiled = error[..., blocks.tiled][same.repeat_interleave(blocks.block_size, -1)]
    worst = torch.cat([tiled, error[..., blocks.isolated].flatten()]).max()
    # relative to the largest output, and one more rounding for R * sparse + C in the output's dtype
    assert worst <= (3 * sdpa_error + torch.finfo(dtype).eps) * want.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_all_blocks_kept_is_sdpa(case):
    call = call_of(case, torch.float32, sparsity=0.0)
    torch.testing.assert_close(run(call)[0], dense(call.qkv, call), rtol=1e-4, atol=1e-5)


def test_same_bits_twice():
    call = call_of(CASES[0], torch.bfloat16, neighbours=True)
    assert torch.equal(run(call)[0], run(call)[0])


def test_no_kernel_of_ours_runs_and_sorting_is_torchs():
    call = call_of(CASES[1], torch.bfloat16, "row", "content")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        _, stats = run(call)
    assert (stats.backend, stats.sorting) == ("torch", "torch")
    names = {event.key for event in profiled.key_averages()}
    ours = ("directions", "project", "halve", "tile", "tail", "scores", "select", "compensate", "attend")
    assert not [each for each in names if each.startswith(tuple(f"_{name}_kernel" for name in ours))]


def test_memory_of_a_long_sequence_is_bounded():
    layout = TokenLayout.build((8, 45, 80), 256)
    q, k, v = (torch.randn(1, layout.sequence, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rectified_attention(q, k, v, layout, SparseConfig.paper(), backend="torch")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2 << 30  # copies of q, k, v and the output, 0.25 GiB, and two chunks of 0.5 GiB with their output


@pytest.mark.parametrize("kind", ["hunyuan", "wan"])
def test_a_model_on_the_gpu(kind):
    import rectified_spaattn as rsa
    import tiny

    model = (tiny.hunyuan_transformer if kind == "hunyuan" else tiny.wan_transformer)().cuda()
    inputs = {k: v.cuda() for k, v in (tiny.hunyuan_inputs if kind == "hunyuan" else tiny.wan_inputs)().items()}
    with torch.no_grad():
        untouched = model(**inputs).sample
        options = {
            "block_size": 16,
            "order": "gilbert",
            "neighbours": False,
            "first_frame": False,
            "dense_layers": (),
            "dense_steps": 0,
        }
        with rsa.enable(model, sparsity=0.0, **options):
            torch.testing.assert_close(model(**inputs).sample, untouched, rtol=1e-3, atol=1e-4)
        with rsa.enable(model, sparsity=0.75, **options) as handle:
            eager = model(**inputs).sample
            model.compile_repeated_blocks(fullgraph=True)
            torch.testing.assert_close(model(**inputs).sample, eager, rtol=1e-3, atol=1e-3)
            assert handle.stats().sparse_calls == 6
        assert torch.equal(model(**inputs).sample.isfinite(), torch.ones_like(untouched, dtype=torch.bool))
