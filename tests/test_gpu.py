"""The torch backend and the seam on a CUDA GPU: `pytest -m gpu`."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cases import MODES, seen, video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

PAPER = SparseConfig(rectify="ipar+gapr", order="gilbert", neighbours=True)
CASES = [
    ((4, 16, 16), 40, False, 64, 64),
    ((5, 9, 11), 17, True, 64, 128),
    ((3, 16, 24), 0, False, 128, 128),
    ((2, 3, 5), 12, False, 64, 64),
]


def on_gpu(grid, text, text_first, block_size, head_dim, dtype):
    layout = TokenLayout.build(grid, text, text_first, block_size)
    qkv = [x.cuda() for x in video_like(0, 2, layout.sequence, 3, head_dim, dtype)]
    mask = torch.arange(text)[None] < torch.tensor([text, text // 3])[:, None]
    return layout, qkv, mask.cuda()


def dense(q, k, v, layout, mask):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=seen(layout, mask)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_error_is_of_the_size_of_sdpas_own(case, mode, dtype):
    layout, qkv, mask = on_gpu(*case, dtype)
    exact = [x.double() for x in qkv]
    exact_dense = dense(*exact, layout, mask)
    sdpa_error = (dense(*qkv, layout, mask).double() - exact_dense).abs().max() / exact_dense.abs().max()
    config = SparseConfig(sparsity=0.7, rectify=mode, neighbours=False)
    out, stats = rectified_attention(*qkv, layout, config, text_mask=mask, return_stats=True)
    # bfloat16 and float16 inputs are exact in float64, so the oracle plans on the same numbers
    given = {"text_mask": mask, "block_mask": stats.block_mask, "backend": "reference", "return_stats": True}
    want, oracle = rectified_attention(*qkv, layout, config, **given)
    # a gain that equals its error up to rounding may fall on either side: such query blocks are not compared
    same = (stats.compensated == oracle.compensated).all(-1)  # [B, H, nb]
    assert same.float().mean() > 0.99 or not same.numel()
    error = (out.double() - want).abs().amax(-1).transpose(1, 2)  # [B, H, S]
    tiled = error[..., layout.tiled.cuda()][same.repeat_interleave(layout.block_size, -1)]
    worst = torch.cat([tiled, error[..., layout.isolated.cuda()].flatten()]).max()
    # relative to the largest output, and one more rounding for R * sparse + C in the output's dtype
    assert worst <= (3 * sdpa_error + torch.finfo(dtype).eps) * want.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_all_blocks_kept_is_sdpa(case):
    layout, qkv, mask = on_gpu(*case, torch.float32)
    out = rectified_attention(*qkv, layout, PAPER.replace(sparsity=0.0), text_mask=mask)
    torch.testing.assert_close(out, dense(*qkv, layout, mask), rtol=1e-4, atol=1e-5)


def test_same_bits_twice():
    layout, qkv, mask = on_gpu(*CASES[0], torch.bfloat16)
    first, second = (rectified_attention(*qkv, layout, PAPER, text_mask=mask) for _ in range(2))
    assert torch.equal(first, second)


def test_memory_of_a_long_sequence_is_bounded():
    layout = TokenLayout.build((8, 45, 80), 256)
    q, k, v = (torch.randn(1, layout.sequence, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rectified_attention(q, k, v, layout, PAPER)
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
        options = {"block_size": 16, "neighbours": False, "first_frame": False, "dense_layers": (), "dense_steps": 0}
        with rsa.enable(model, sparsity=0.0, **options):
            torch.testing.assert_close(model(**inputs).sample, untouched, rtol=1e-3, atol=1e-4)
        with rsa.enable(model, sparsity=0.75, **options) as handle:
            eager = model(**inputs).sample
            model.compile_repeated_blocks(fullgraph=True)
            torch.testing.assert_close(model(**inputs).sample, eager, rtol=1e-3, atol=1e-3)
            assert handle.stats().sparse_calls == 6
        assert torch.equal(model(**inputs).sample.isfinite(), torch.ones_like(untouched, dtype=torch.bool))
