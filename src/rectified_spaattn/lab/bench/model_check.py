"""Is it right? A few layers of a transformer on a small grid, with each kind of attention, against float32."""

from collections.abc import Mapping

import torch
from torch import nn

from .architecture import Model
from .check import Check, require
from .model_rows import Key
from .shapes import REMOVED, BenchError, Case, Variant
from .weights import enable, exact, inputs_for, output, shallow_copy

_FLOAT32_NOISE = 1e-5  # what another order of summation does, through all layers


def check_model(weights: nn.Module, model: Model, variants: list[Variant], case: Case) -> list[Check]:
    """One unit on the small form of the shape: every dense variant, and every backend with all blocks kept.

    The error allowed is twice that of the untouched model in its own dtype, and rounding. Raises BenchError where one
    is larger, and where removing attention is not: then nothing would be noticed.
    """
    untouched = shallow_copy(weights, model, 1)
    inputs = inputs_for(model, model.shape.small().grid, case.device, case.dtype)
    want = exact(untouched, inputs)
    own = relative_error(output(untouched, inputs), want)
    budget = 2 * own + torch.finfo(case.dtype).eps + _FLOAT32_NOISE

    def error(variant: Variant) -> float:
        twin = shallow_copy(weights, model, 1)
        enable(twin, variant, case.config)
        return relative_error(output(twin, inputs), want)

    attended = (each if each.kind == "dense" else each._replace(sparsity=0.0) for each in variants if each != REMOVED)
    checks = [
        require(Check(each.name, f"{model.name} with {each.kind} attention", error(each), budget))
        for each in dict.fromkeys(attended)
    ]
    if not error(REMOVED) > budget:
        raise BenchError(
            f"{model.name}: got the same output without attention; nothing was checked, nothing was timed."
        )
    return checks


def check_first_runs(
    name: str, outputs: dict[Key, torch.Tensor], budget: float, alone: Mapping[Variant, torch.Tensor] | None = None
) -> list[Check]:
    """At full size: nothing is infinite or NaN, and compiled forwards of one unit equal eager ones.

    alone: of one unit, eager, in one process, where several share the forwards: theirs equal those, too.
    Each of the two may be off by the budget of check_model. Sparse ones may also choose other blocks where rounding
    differs: they may differ by as much as they differ from dense attention, too. Raises BenchError.
    """
    for key, got in outputs.items():
        if not bool(got.isfinite().all()):
            raise BenchError(f"{name}: got infinite values or NaN from {key.variant}, {key.how}. Nothing was timed.")
    dense = next(got for key, got in outputs.items() if key.units == 1)
    checks = []
    for key, got in outputs.items():
        if key.units != 1 or (key.how == "eager" and not alone):
            continue
        want = outputs[key._replace(how="eager")] if key.how == "compiled" else (alone or {})[key.variant]
        more = relative_error(want, dense) if key.variant.kind == "sparse" else 0.0
        what = f"{name} with {key.variant.kind} attention {'compiled' if key.how == 'compiled' else 'shared'}"
        checks.append(require(Check(str(key.variant), what, relative_error(got, want), 2 * budget + more)))
    return checks


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of `want`; NaN where a value is not finite."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())
