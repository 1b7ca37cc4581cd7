"""How many kernels a call of the Triton backend launches: counted on a device without data, where none runs."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.backends import BACKENDS
from rectified_spaattn.method.inputs import Inputs
from rectified_spaattn.orders import blocks_of

META = torch.device("meta")
FILES = ("arrange", "attend", "directions", "plan", "queries", "select", "slope", "tile")
LAYOUT = TokenLayout.build((21, 30, 52))  # Wan 1.3B at 480p: 255 blocks


class Launches(TorchDispatchMode):
    """The names of kernels and of PyTorch's operations, but of those that only look at memory or take it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for module in (import_module(f"rectified_spaattn.backends.triton.{name}") for name in FILES):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Kernel(self.names, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name() and "_unsafe_view" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Kernel:
    """In place of one that is launched as kernel[grid](...)."""

    def __init__(self, names: list[str], name: str) -> None:
        self.names, self.name = names, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self.names.append(self.name)


@pytest.mark.parametrize(("kept", "most"), [("nothing", 24), ("order", 17), ("order and lists", 9)])
def test_a_call_launches_few_kernels(kept: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, row = SparseConfig(), BACKENDS["triton"]
    q, k, v = (torch.empty(1, LAYOUT.sequence, 12, 128, dtype=torch.bfloat16, device=META) for _ in "qkv")
    blocks = blocks_of(LAYOUT, config).on(META)
    inputs = Inputs(q, k, v, blocks, config, blocks.all_text, 0.1)
    assert blocks.places.numel() == 256 * 128  # made once for a layout
    with Launches(monkeypatch) as launches:
        if kept == "nothing":
            inputs = inputs._replace(token_order=row.sort(inputs))
        else:
            inputs = inputs._replace(token_order=torch.empty(1, 12, 255 * 128, dtype=torch.int32, device=META))
        if kept == "order and lists":
            mask = torch.empty(1, 12, 255, 255, dtype=torch.bool, device=META)
            inputs = inputs._replace(block_mask=mask)
        out = row.attend(inputs, row.plan(inputs)[1])
    assert out.shape == q.shape
    assert len(launches.names) <= most, launches.names
