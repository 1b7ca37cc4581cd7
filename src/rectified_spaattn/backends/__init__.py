"""Which backend runs a call, and why another cannot."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.plan import Plan
from ..method.reference import reference
from . import torch_gather

Run = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        TokenLayout,
        SparseConfig,
        torch.Tensor,
        float,
        torch.Tensor | None,
    ],
    tuple[torch.Tensor, Plan],
]


class Backend(NamedTuple):
    """`why_not` gives the reason why a call on this device and dtype cannot run, or None where it can."""

    run: Run
    why_not: Callable[[torch.device, torch.dtype], str | None]


def _run_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    text_valid: torch.Tensor,
    scale: float,
    block_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, Plan]:
    done = reference(q, k, v, layout, config, text_valid, scale, block_mask)
    unused = done.r.new_zeros(*done.r.shape, 0)  # the oracle keeps C to itself
    return done.out, Plan(done.block_mask, done.compensated, done.probability, done.r, unused)


def _not_float64(device: torch.device, dtype: torch.dtype) -> str | None:
    return "float64 runs on backend='reference' only" if dtype == torch.float64 else None


BACKENDS: dict[str, Backend] = {
    "torch": Backend(torch_gather.run, _not_float64),
    "reference": Backend(_run_reference, lambda device, dtype: None),
}
AUTO_ORDER = ("torch",)  # fastest first; the oracle is never chosen unasked


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs a call: `name` itself, or for "auto" the fastest that can.

    Raises ValueError for an unknown name, RuntimeError where the named backend (or, for "auto", none) can run the call.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: one of {['auto', *BACKENDS]}.")
    reasons = {n: BACKENDS[n].why_not(device, dtype) for n in (AUTO_ORDER if name == "auto" else (name,))}
    for candidate, reason in reasons.items():
        if reason is None:
            return candidate
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RuntimeError(f"backend={name!r} cannot run {dtype} on {device}: {told}.")
