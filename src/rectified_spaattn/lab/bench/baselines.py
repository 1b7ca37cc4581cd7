"""Dense attention to compare with. Every baseline takes and gives [B, S, H, D]."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from .shapes import Case

if TYPE_CHECKING:  # options are read and help is shown without it
    import torch


class Baseline(NamedTuple):
    """run: q, k, v [B, S, H, D] -> [B, S, H, D]; why_not: the reason why a case cannot run, None where it can."""

    run: "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]"
    why_not: Callable[[Case], str | None]


def sdpa(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    """PyTorch's attention, by whichever kernel PyTorch picks."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _by(kernel: str, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return sdpa(q, k, v)


def _fa4(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too


def _no_cudnn(case: Case) -> str | None:
    import torch

    there = torch.version.cuda is not None and torch.backends.cudnn.is_available()
    return no_gpu_for(case, (8, 0), 128) or (None if there else "this build of torch has no cuDNN")


def _no_flash2(case: Case) -> str | None:
    import torch

    there = torch.backends.cuda.is_flash_attention_available()
    return no_gpu_for(case, (8, 0), 256) or (None if there else "this build of torch has no FlashAttention-2")


def _no_fa4(case: Case) -> str | None:
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    import torch

    there = case.device.type != "cuda" or torch.version.cuda is not None
    return no_gpu_for(case, (9, 0), 128) if there else "needs an NVIDIA GPU, this build of torch is for another"


def no_gpu_for(case: Case, oldest: tuple[int, int], head_dim: int) -> str | None:
    """What these kernels have in common: an NVIDIA GPU of at least this compute capability, half precision, D."""
    import torch

    if case.device.type != "cuda":
        return f"needs a CUDA GPU, the device is {case.device}"
    major, minor = torch.cuda.get_device_capability(case.device)
    if (major, minor) < oldest:
        return f"needs compute capability {oldest[0]}.{oldest[1]} or higher, this GPU has {major}.{minor}"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"runs float16 and bfloat16 only, the dtype is {case.dtype}"
    if case.shape.head_dim > head_dim:
        return f"runs head sizes up to {head_dim}, this shape has {case.shape.head_dim}"
    return None


BASELINES: dict[str, Baseline] = {
    "cudnn": Baseline(partial(_by, "CUDNN_ATTENTION"), _no_cudnn),
    "flash2": Baseline(partial(_by, "FLASH_ATTENTION"), _no_flash2),
    "fa4": Baseline(_fa4, _no_fa4),
    "sdpa": Baseline(sdpa, lambda case: None),
}


def compared_with(timed: Sequence[str]) -> str:
    """The baseline that speed-ups are over: cuDNN's attention or PyTorch's choice, else the first that was timed."""
    return next((name for name in ("cudnn", "sdpa") if name in timed), timed[0])
