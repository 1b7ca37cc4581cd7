"""No float64 outside the reference: devices such as MPS and XPU have none."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rectified_spaattn as rsa
from cases import MODES, video_like
from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.method.density import density
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.orders import blocks_of

LAYOUT = TokenLayout.build((2, 8, 9), text=11)  # two blocks of 64, and 16 tokens in none


class NoFloat64(TorchDispatchMode):
    """Fails where any operation makes a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float64, torch.complex128):
                raise AssertionError(f"{func} made a {leaf.dtype} tensor")
        return result


def test_the_mode_sees_what_it_is_for() -> None:
    with NoFloat64(), pytest.raises(AssertionError, match="float64"):
        torch.ones(3).double()


@pytest.mark.parametrize(
    ("backend", "mode", "order"),
    [
        *(("torch", mode, order) for mode in MODES for order in ("gilbert", "content")),
        *(("triton", "ipar+gapr", "gilbert"), ("triton", "pooled", "gilbert"), ("triton", "query+slope", "content")),
    ],
)
def test_no_stage_makes_a_float64(mode: Any, order: Any, backend: str) -> None:
    """The stages as the op runs them: what happens inside an op is hidden from a mode around it."""
    config = SparseConfig(rectify=mode, order=order, block_size=64, sparsity=0.5, top_p=0.0)
    q, k, v = video_like(0, 1, LAYOUT.sequence, 1, 64)
    mask, row = torch.arange(11)[None] < 7, BACKENDS[backend]
    with NoFloat64():
        inputs = Inputs(q, k, v, blocks_of(LAYOUT, config), config, mask, 0.125)
        if order == "content":
            inputs = inputs._replace(token_order=row.sort(inputs))
        choices, prepared = row.plan(inputs)
        assert row.attend(inputs, prepared).isfinite().all()
        assert density(choices.block_mask, LAYOUT, config, mask) < 1
        rsa.attend(q, k, v, rsa.plan(q, k, v, LAYOUT, config, text_mask=mask, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_default_dtype_of_float64_does_not_leak_into_the_stages(dtype: torch.dtype) -> None:
    qkv = video_like(1, 1, LAYOUT.sequence, 2, 64, dtype)
    config = SparseConfig(block_size=64)
    want = rsa.rectified_attention(*qkv, LAYOUT, config)
    torch.set_default_dtype(torch.float64)
    try:
        got = rsa.rectified_attention(*qkv, LAYOUT, config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
