"""What every backend would do on a machine, and whether those that run are right with the settings that users have."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...backends import BACKENDS, Call, choose
from ...backends.triton import HEAD_DIMS
from ...config import SparseConfig
from ..machine import DEVICES, device_of
from ..option import ConfigOptions, option
from .check import check_small
from .shapes import DTYPES, BenchError, Case, Shape

# Some blocks of either size, and 16 tokens that fill none; text behind the video.
_CHECKED = Shape(name="self-check", grid=(5, 13, 16), text=10, heads=2)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(ConfigOptions):
    """One diagnosis. Raises ValueError or TypeError for values out of range."""

    sparsity: float | None = option("Share of blocks to drop.", None, unset="the preset's; 0.8")
    device: str = option("Where to run.", "auto", choices=DEVICES)
    json: bool = option("Print JSON alone.", False)

    def __post_init__(self) -> None:
        device_of(self.device)
        video, block_size = _CHECKED.video, self.config().block_size
        if video // block_size < 2:
            raise ValueError(f"block_size: got {block_size}; allowed: {video // 2 // 16 * 16} or less here.")

    def config(self, **more: Any) -> SparseConfig:
        return super().config(**({} if self.sparsity is None else {"sparsity": self.sparsity}), **more)


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
        call = Call(device, DTYPES[dtype], head_dim, config.block_size)
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
    case = Case(replace(_CHECKED, head_dim=call.head_dim), config, call.dtype, call.device)
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
