"""What every backend would do on a machine, and whether those that run are right with the settings that users have."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...backends import BACKENDS, Call, choose
from ...backends.triton import HEAD_DIMS
from ...config import SparseConfig
from .check import check_small
from .shapes import DTYPES, SELF_CHECK, BenchError, Case


class Verdict(NamedTuple):
    """One call. why_not: backend -> the reason why it cannot run, None where it can. auto: what "auto" takes."""

    dtype: str
    head_dim: int
    block_size: int
    why_not: dict[str, str | None]
    auto: str


class SelfCheck(NamedTuple):
    """One backend on small inputs. error, allowed: relative to the largest exact value; wrong: what was."""

    backend: str
    dtype: str
    head_dim: int
    block_size: int
    error: float | None
    allowed: float | None
    wrong: str | None

    @property
    def result(self) -> str:
        return "WRONG" if self.wrong else "right"


def verdicts(device: torch.device, config: SparseConfig) -> dict[Call, Verdict]:
    """For every dtype, with the head dims of models."""
    judged = {}
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        call = Call(device, getattr(torch, dtype), head_dim, config.block_size)
        why_not = {name: backend.why_not(call) for name, backend in BACKENDS.items()}
        judged[call] = Verdict(dtype, head_dim, config.block_size, why_not, choose("auto", call))
    return judged


def calls_to_check(judged: Mapping[Call, Verdict]) -> list[tuple[str, Call]]:
    """For every backend and dtype, the largest of the calls that it can run, up to the head_dim of most models."""
    usual = {call: each for call, each in judged.items() if call.head_dim <= 128}
    able = {(name, call.dtype): call for name in BACKENDS for call, each in usual.items() if not each.why_not[name]}
    return [(name, call) for (name, _), call in able.items()]


def check(name: str, call: Call, config: SparseConfig) -> SelfCheck:
    """The backend with every block kept against dense float64 attention, and as configured against the reference.

    A backend that raises is reported as wrong: that it says it can run a call and then cannot is what to find here.
    """
    case = Case(replace(SELF_CHECK, head_dim=call.head_dim), config, call.dtype, call.device)
    error = allowed = wrong = None
    try:
        _, _, error, allowed = max(check_small(case, name), key=lambda each: each.error / each.allowed)
    except BenchError as problem:
        wrong = str(problem)
    except Exception as problem:
        wrong = f"{type(problem).__name__}: {problem}"
    return SelfCheck(name, case.dtype_name, call.head_dim, call.block_size, error, allowed, wrong)


def healthy(checks: Sequence[SelfCheck]) -> bool:
    """At least one backend was checked, and none is wrong."""
    return bool(checks) and not any(each.wrong for each in checks)
