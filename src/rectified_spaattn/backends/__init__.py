"""Which backend runs a call, and why another cannot."""

from ..config import BACKEND_NAMES, check_choice
from . import fa4, reference, torch, triton
from .calls import Backend, Call

_ROWS = (fa4.BACKEND, triton.BACKEND, torch.BACKEND, reference.BACKEND)
BACKENDS: dict[str, Backend] = dict(zip(BACKEND_NAMES, _ROWS, strict=True))


def choose(name: str, call: Call) -> str:
    """The backend that runs a call: `name` itself, or for "auto" the fastest that can.

    Raises ValueError for an unknown name, RuntimeError where the named backend (or, for "auto", none) can run the call.
    """
    check_backend(name)
    candidates = _fastest_first(call) if name == "auto" else (name,)
    reasons = {candidate: BACKENDS[candidate].why_not(call) for candidate in candidates}
    for candidate, reason in reasons.items():
        if reason is None:
            return candidate
    why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RuntimeError(
        f"backend={name!r} cannot run {call.dtype} on {call.device}: {why}. "
        "`rectified-spaattn doctor` shows what can run here."
    )


def _fastest_first(call: Call) -> tuple[str, ...]:
    """Without the oracle, which is never chosen unasked, and without kernels where they could only be interpreted."""
    if call.device.type != "cuda":
        return ("torch",)
    gluon = triton.why_not_gluon(triton.arch_of(call.device), call.block_size, call.head_dim) is None
    return ("triton", "fa4", "torch") if gluon else ("fa4", "triton", "torch")


def check_backend(name: str) -> None:
    """Raises TypeError or ValueError unless this is "auto" or the name of a backend."""
    check_choice("backend", name, ("auto", *BACKENDS))
