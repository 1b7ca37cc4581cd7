"""The float64 oracle as a backend: everything is done where it plans."""

import torch

from ..method.inputs import Inputs
from ..method.plan import Choices
from ..method.reference import reference
from .calls import Backend
from .torch import sort


def _plan(inputs: Inputs) -> tuple[Choices, torch.Tensor]:
    result = reference(inputs)
    return Choices(result.block_mask, result.compensated, result.probability, result.r), result.out


BACKEND = Backend(why_not=lambda call: None, sorting="torch", sort=sort, plan=_plan, attend=lambda inputs, out: out)
