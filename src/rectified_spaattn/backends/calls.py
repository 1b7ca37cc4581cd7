"""What decides whether a backend can run a call, and what a backend is."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ..method.inputs import Inputs
from ..method.plan import Choices


class Call(NamedTuple):
    """One call of the operator, as far as it matters here."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    num_blocks: int = 1
    precision: str = "inputs"


class Backend(NamedTuple):
    """One way to run the operator.

    why_not  the reason why a call cannot run, or None where it can
    sorting  what sorts tokens by content: "triton" or "torch"
    sort     the order of the tiled tokens by content, int [B, H, nb*b]
    plan     stages 1 to 5: what was chosen, and all that `attend` of the same backend needs
    attend   stage 6: out [B, S, H, D], in the memory that the inputs name, if any
    copies   whether `plan` copies q, k and v whole, and `attend` writes to any strides
    """

    why_not: Callable[[Call], str | None]
    sorting: str
    sort: Callable[[Inputs], torch.Tensor]
    plan: Callable[[Inputs], tuple[Choices, Any]]
    attend: Callable[[Inputs, Any], torch.Tensor]
    copies: bool = False


def why_not_8_bits(call: Call) -> str | None:
    """Of every backend but triton."""
    return None if call.precision == "inputs" else f"precision {call.precision!r}, which triton runs"


@cache
def installed_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def triton_version() -> str | None:
    """Version of Triton under whatever name it was installed (triton, triton-windows, pytorch-triton, ...)."""
    if find_spec("triton") is None:
        return None
    return next(iter(version(name) for name in packages_distributions().get("triton", ())), None)
