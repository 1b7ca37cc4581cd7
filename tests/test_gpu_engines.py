"""What adapters to engines share, on a GPU: GPU_TESTS=tests/test_gpu_engines.py make gpu-test."""

import pytest
import torch

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.engines.attend import Place, Seam
from rectified_spaattn.engines.masks import Masks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LAYOUT = TokenLayout.build((4, 16, 16), text=40)
PLACE = Place(layer=0, name="block 0", step=0, total=4)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_masked_call_of_an_engine_runs_on_kernels(head_dim: int) -> None:
    """bfloat16, a mask added to the logits; all blocks kept is full attention, to twice what SDPA's own dtype costs."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, LAYOUT.sequence, 4, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3))
    mask = torch.zeros(2, 1, LAYOUT.sequence, device="cuda", dtype=torch.bfloat16)
    mask[0, :, -7:] = torch.finfo(torch.bfloat16).min

    def dense(dtype: torch.dtype) -> torch.Tensor:
        heads = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=(mask == 0)[:, None])
        return attended.transpose(1, 2).float()

    exact = dense(torch.float32)
    budget = 2 * float((dense(torch.bfloat16) - exact).abs().max())
    full = Seam(config=SparseConfig(sparsity=0.0, top_p=1.0))
    out = full.attend(q, k, v, LAYOUT, PLACE, mask=mask, masks=Masks())
    assert out is not None
    assert float((out.float() - exact).abs().max()) <= budget
    sparse = Seam(config=SparseConfig(sparsity=0.5, top_p=0.0))
    assert sparse.attend(q, k, v, LAYOUT, PLACE, mask=mask, masks=Masks()) is not None
    assert sparse.record.density < 0.8
    assert sparse.record.backends <= {"triton", "fa4"}
