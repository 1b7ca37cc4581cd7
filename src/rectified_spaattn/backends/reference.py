"""The float64 oracle as a backend: everything is done where it plans."""

import torch

from ..method.inputs import Inputs
from ..method.plan import Choices
from ..method.reference import reference
from .calls import Backend, Call, why_not_8_bits
from .torch import sort


def _plan(inputs: Inputs) -> tuple[Choices, torch.Tensor]:
    result = reference(inputs)
    return Choices(result.block_mask, result.compensated, result.probability, result.r), result.out


def why_not(call: Call) -> str | None:
    reason = why_not_8_bits(call)
    return None if reason is None else f"{reason}: it is exact"


BACKEND = Backend(why_not=why_not, sorting="torch", sort=sort, plan=_plan, attend=lambda inputs, out: out)
