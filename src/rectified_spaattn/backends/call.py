"""What decides whether a backend can run a call."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_HEAD_DIMS = (64, 128)
KERNEL_BLOCK_SIZES = (64, 128)
KERNEL_MAX_BLOCKS = 8191  # one program holds a row of key blocks in registers
OLDEST_TRITON = (3, 4)  # the first with host-side tensor descriptors

Stages = dict[str, Callable[[], object]]


class Call(NamedTuple):
    """One call of the operator, as far as it matters here."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    num_blocks: int = 1


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def triton_version() -> str | None:
    """Version of Triton, which PyTorch's ROCm builds install under a name of their own."""
    return installed_version("triton") or installed_version("pytorch-triton-rocm") or installed_version("triton-rocm")


def why_no_kernels(call: Call) -> str | None:
    """Why the Triton kernels cannot run a call, or None where they can."""
    return _why_no_triton() or _why_not_on(call.device) or _why_not_this(call)


def _why_no_triton() -> str | None:
    found = triton_version()
    if found is None:
        return "triton is not installed (pip install triton)"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found} is too old, {wanted} or newer is needed (PyTorch 2.8 or newer brings it)"
    return None


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"the kernels run on a GPU, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"
    return None


def _why_not_this(call: Call) -> str | None:
    allowed = (torch.float16, torch.float32) if call.device.type == "cpu" else KERNEL_DTYPES
    if call.dtype not in allowed:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"{str(call.dtype).removeprefix('torch.')} inputs, the kernels take {names}"
    if call.head_dim not in KERNEL_HEAD_DIMS:
        return f"head_dim {call.head_dim}, the kernels take 64 and 128"
    if call.block_size not in KERNEL_BLOCK_SIZES:
        return f"block_size {call.block_size}, the kernels take 64 and 128"
    if call.num_blocks > KERNEL_MAX_BLOCKS:
        return f"{call.num_blocks} blocks, the kernels take {KERNEL_MAX_BLOCKS}: use a larger block_size"
    return None


def _interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is for tests: TRITON_INTERPRET=1."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
