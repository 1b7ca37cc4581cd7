"""The dense-matrix variants of the tail study against the reference backend, where both know the mode."""

import sys
from pathlib import Path

import pytest
import torch

from cases import video_like
from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from tail_variants import VARIANTS, attend

MODES = {"none": "none", "ipar": "ipar", "ipar+gapr": "ipar+gapr", "row + s2, cap 2": "row"}


@pytest.mark.parametrize("variant", MODES)
def test_a_variant_is_the_reference_backend_in_that_mode(variant: str) -> None:
    layout = TokenLayout.build((3, 5, 7), text=9, block_size=16)  # 6 blocks and 9 leftover tokens
    q, k, v = (x.double() for x in video_like(5, 2, layout.sequence, 2, 8))
    valid = torch.arange(9) < torch.tensor([9, 4])[:, None]
    config = SparseConfig(sparsity=0.6, rectify=MODES[variant], neighbours=False, top_p=0.0)
    want = rectified_attention(q, k, v, layout, config, text_mask=valid, backend="reference")
    torch.testing.assert_close(attend(VARIANTS[variant], q, k, v, layout, valid, 0.6), want, rtol=0, atol=1e-10)
