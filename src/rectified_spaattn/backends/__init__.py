"""Which backend runs a call, and why another cannot."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.arrange import arrange, put_back
from ..method.plan import Plan
from ..method.reference import reference
from . import fa4, torch_gather, triton
from .call import Call, Stages

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
        torch.Tensor | None,
    ],
    tuple[torch.Tensor, Plan],
]


class Backend(NamedTuple):
    """One way to run the operator.

    why_not  gives the reason why a call cannot run, or None where it can
    stages   the stages of one call by name, each a function that runs it once more; None where there is nothing to time
    """

    run: Run
    why_not: Callable[[Call], str | None]
    stages: Callable[..., Stages] | None = None


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


def _arranging(run: Callable[..., tuple[torch.Tensor, Plan]]) -> Run:
    """A backend that knows one order for all heads: given another, it runs on copies that are arranged accordingly."""

    def arranged_run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        config: SparseConfig,
        text_valid: torch.Tensor,
        scale: float,
        block_mask: torch.Tensor | None,
        token_order: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Plan]:
        if token_order is None:
            return run(q, k, v, layout, config, text_valid, scale, block_mask)
        tiled = layout.on(q.device).tiled
        moved = (arrange(x, tiled, token_order) for x in (q, k, v))
        out, plan = run(*moved, layout, config, text_valid, scale, block_mask)
        return put_back(out, tiled, token_order), plan

    return arranged_run


BACKENDS: dict[str, Backend] = {
    "fa4": Backend(fa4.run, fa4.why_not, fa4.stages),
    "triton": Backend(triton.run, triton.why_not, triton.stages),
    "torch": Backend(_arranging(torch_gather.run), torch_gather.why_not),
    "reference": Backend(_arranging(_run_reference), lambda call: None),
}
# Fastest first. The oracle is never chosen unasked, nor are kernels where they could only be interpreted.
AUTO_ORDER = {"cuda": ("fa4", "triton", "torch")}


def choose(name: str, call: Call) -> str:
    """The backend that runs a call: `name` itself, or for "auto" the fastest that can.

    Raises ValueError for an unknown name, RuntimeError where the named backend (or, for "auto", none) can run the call.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: one of {['auto', *BACKENDS]}.")
    candidates = AUTO_ORDER.get(call.device.type, ("torch",)) if name == "auto" else (name,)
    reasons = {candidate: BACKENDS[candidate].why_not(call) for candidate in candidates}
    for candidate, reason in reasons.items():
        if reason is None:
            return candidate
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RuntimeError(
        f"backend={name!r} cannot run {call.dtype} on {call.device}: {told}. "
        "`rectified-spaattn doctor` shows what can run here."
    )
