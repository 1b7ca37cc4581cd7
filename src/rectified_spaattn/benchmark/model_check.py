"""Is it right? A few layers of a transformer on a small grid, with each kind of attention, against float32."""

import torch
from torch import nn

from .check import BenchError, Checked, require
from .model_rows import Key
from .models import Model
from .modes import REMOVED, Mode, enable
from .shapes import Case
from .weights import exact, inputs_for, output, shallow_copy

_FLOAT32_NOISE = 1e-5  # what another order of summation does, through all layers


def check_model(weights: nn.Module, model: Model, modes: list[Mode], case: Case) -> list[Checked]:
    """One unit on the small form of the shape: every dense mode, and every backend with all blocks kept.

    The error allowed is twice that of the untouched model in its own dtype, and rounding. Raises BenchError where one
    is larger, and where removing attention is not: then nothing would be noticed.
    """
    untouched = shallow_copy(weights, model, 1)
    inputs = inputs_for(model, model.shape.small().grid, case.device, case.dtype)
    want = exact(untouched, inputs)
    own = relative_error(output(untouched, inputs), want)
    budget = 2 * own + torch.finfo(case.dtype).eps + _FLOAT32_NOISE

    def error(mode: Mode) -> float:
        twin = shallow_copy(weights, model, 1)
        enable(twin, mode, case)
        return relative_error(output(twin, inputs), want)

    attended = [mode for mode in modes if mode != REMOVED]
    whole = dict.fromkeys(mode if mode.kind == "dense" else mode._replace(sparsity=0.0) for mode in attended)
    checks = [
        require(Checked(mode.name, f"{model.name} with {mode.kind} attention", error(mode), budget)) for mode in whole
    ]
    if not error(REMOVED) > budget:
        raise BenchError(
            f"{model.name}: got the same output without attention; nothing was checked, nothing was timed."
        )
    return checks


def check_first_runs(name: str, outputs: dict[Key, torch.Tensor], budget: float) -> list[Checked]:
    """At full size: nothing is infinite or NaN, and compiled forwards of one unit equal eager ones.

    Each of the two may be off by the budget of check_model. Sparse ones may also choose other blocks where rounding
    differs: they may differ by as much as they differ from dense attention, too. Raises BenchError.
    """
    for key, got in outputs.items():
        if not bool(got.isfinite().all()):
            raise BenchError(f"{name}: got infinite values or NaN from {key.mode}, {key.how}. Nothing was timed.")
    dense = next(got for key, got in outputs.items() if key.units == 1)
    checks = []
    for key, got in outputs.items():
        if key.how == "compiled" and key.units == 1:
            eager = outputs[key._replace(how="eager")]
            more = relative_error(eager, dense) if key.mode.kind == "sparse" else 0.0
            what = f"{name} with {key.mode.kind} attention compiled"
            checks.append(require(Checked(str(key.mode), what, relative_error(got, eager), 2 * budget + more)))
    return checks


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of `want`; NaN where a value is not finite."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())
