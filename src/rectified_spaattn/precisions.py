"""precision="auto": which calls of a run multiply kept blocks in 8 bits, by what 8 bits add to the measured error."""

import threading
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from statistics import fmean
from typing import Any, NamedTuple

import torch

from .attention import SparseStats, rectified_attention
from .backends import BACKENDS, Call, choose
from .budgets import Budgets
from .config import PROBES, SparseConfig
from .kept_plans import KeptPlans, Moment
from .layout import TokenLayout

KINDS = ("fp8", "int8-qk")  # the first that the backend of a call can run
ADDED = 0.1
"""By what share 8 bits may raise the squared error of a call.

What rounding changes has nothing to do with what was left out, so their squares add: a tenth makes the error 4.9%
larger, a fourth of the 20% within which a tolerance takes an error for the one that was asked for.
"""
ENTER = 0.8  # of ADDED: what it may be at most where a call that was in 16 bits goes to 8
EVERY = 25  # denoising steps from one look to the next, which is one more call: two in a run of 50 steps


class Look(NamedTuple):
    """Errors of a call in both precisions, with the same order and the same blocks: root mean square over its heads."""

    in_16: float
    in_8: float

    def allows(self, added: float) -> bool:
        """Whether 8 bits raise the squared error by at most this share; no where an error is not finite."""
        return self.in_8**2 <= (1 + added) * self.in_16**2


class CallKey(NamedTuple):
    """What calls must have in common for one to decide for others: layer, which guidance call of its step, shape."""

    layer: int
    turn: int
    layout: str
    shape: torch.Size
    device: torch.device


class Decision(NamedTuple):
    """precision: of the calls of the steps from `made` on, until the next look."""

    precision: str
    made: int


class Due(NamedTuple):
    """A call that is looked at. kind: of 8 bits, that its backend can run."""

    key: CallKey
    kind: str


class Precisions:
    """What was decided in one run. Threads may share it. A look waits for the device, nothing else does.

    calls   sparse calls by precision; one that was looked at is in that of the inputs
    looks   the precision that each decided on, and its errors
    unable  calls that nothing could decide on, by reason
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.looks: list[tuple[str, Look]] = []
        self.unable: Counter[str] = Counter()
        self._decided: dict[CallKey, Decision] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._decided)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        config: SparseConfig,
        budgets: Budgets,
        plans: KeptPlans,
        moment: Moment,
        *,
        turn: int,
        **options: Any,
    ) -> tuple[torch.Tensor, SparseStats, torch.Tensor | None]:
        """budgets.attend in the precision that is decided for such a call, or decided now, for those that follow."""
        precision: str = config.precision
        due = None
        if precision == "auto":
            precision, due = self._now(q, layout, config, moment, turn, options.get("backend", "auto"))
        own = _settled(config, precision, due is not None)
        out, stats, full = budgets.attend(q, k, v, layout, own, plans, moment, turn=turn, step=moment.step, **options)
        with self._lock:
            self.calls[precision] += 1
        if due is not None:
            look = _look(q, k, v, layout, _settled(config, due.kind, True), stats, **options)
            self._decide(due, moment.step or 0, look)
        return out, stats, full

    def _now(
        self, q: torch.Tensor, layout: TokenLayout, config: SparseConfig, moment: Moment, turn: int, backend: str
    ) -> tuple[str, Due | None]:
        """The precision of a call, and whether it is looked at."""
        problem, kind = "", ""
        if moment.step is None or moment.layer is None:
            problem = moment.problem or "the layer or the step is unknown"
        elif q.is_cuda and torch.cuda.is_current_stream_capturing():
            problem = "a CUDA graph is being captured, which would keep to what is decided now"
        else:
            key = CallKey(moment.layer, turn, layout.key, q.shape, q.device)
            decided = self._decided.get(key)
            if decided is not None and decided.made <= moment.step < decided.made + EVERY:
                return decided.precision, None
            kind, problem = _kind(q, layout, config, backend)
        if problem:
            with self._lock:
                self.unable[problem] += 1
            return "inputs", None
        return "inputs", Due(key, kind)

    def _decide(self, due: Due, step: int, look: Look) -> None:
        with self._lock:
            before = self._decided.get(due.key)
            entered = before is not None and before.precision != "inputs"
            precision = due.kind if look.allows(ADDED if entered else ENTER * ADDED) else "inputs"
            self._decided[due.key] = Decision(precision, step)
            self.looks.append((precision, look))

    def lines(self, config: SparseConfig, of: str = "") -> Iterator[str]:
        """What a summary says, each line with its indent. of: whose calls they were."""
        if config.precision != "auto" or not self.calls:
            return
        asked = f"  precision auto{of}:"
        yield f"{asked} " + ", ".join(f"{count} calls in {_words(name)}" for name, count in sorted(self.calls.items()))
        for name in sorted({precision for precision, _ in self.looks}):
            looks = [look for precision, look in self.looks if precision == name]
            in_16, in_8 = (fmean(errors) for errors in zip(*looks, strict=True))
            yield (
                f"{asked} {len(looks)} looks chose {_words(name)}, where the error of a call was {in_16:.4f}, and "
                f"{in_8:.4f} in 8 bits"
            )
        for problem, count in sorted(self.unable.items()):
            yield f"{asked} {count} calls stayed in {_words('inputs')}, because {problem}"


def _kind(q: torch.Tensor, layout: TokenLayout, config: SparseConfig, backend: str) -> tuple[str, str]:
    """Which 8 bits there are for a call, and why there are none."""
    call = Call(q.device, q.dtype, q.shape[-1], config.block_size, layout.video // config.block_size)
    name = choose(backend, call)
    reasons = {kind: BACKENDS[name].why_not(call._replace(precision=kind)) for kind in KINDS}
    able = [kind for kind, reason in reasons.items() if reason is None]
    return (able[0], "") if able else ("", f"{name}, which attends here, cannot run {reasons[KINDS[-1]]}")


def _look(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    stats: SparseStats,
    **options: Any,
) -> Look:
    """A call that ran in the inputs' precision, once more in that of config. Waits for the device."""
    options |= {"block_mask": stats.block_mask, "token_order": stats.token_order, "backend": stats.backend}
    _, again = rectified_attention(q, k, v, layout, config, return_stats=True, **options)
    probes = (stats.probe, again.probe)
    errors = torch.stack([probe.error.square().mean().sqrt() for probe in probes if probe is not None])
    in_16, in_8 = errors.tolist()
    return Look(in_16, in_8)


@lru_cache(maxsize=64)
def _settled(config: SparseConfig, precision: str, measured: bool) -> SparseConfig:
    """The config in a precision; measured: with probe rows, in any case."""
    probes = config.probe_rows or PROBES if measured else config.probes
    return config.replace(precision=precision, probes=probes)


def _words(precision: str) -> str:
    return "the inputs' precision" if precision == "inputs" else precision
