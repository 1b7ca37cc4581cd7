"""The kinds of attention a transformer is timed with. All go through the seam of `enable`: nothing else differs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .baselines import BASELINES
from .check import config_at
from .shapes import Case

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Mode(NamedTuple):
    """kind: "dense", "sparse" or "removed"; name: of the baseline or of the backend."""

    kind: str
    name: str
    sparsity: float | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + ("" if self.sparsity is None else f" {self.sparsity!r}")


REMOVED = Mode("removed", "none")


def enable(transformer: Any, mode: Mode, case: Case) -> Any:
    """Enables rectified attention on a transformer; a mode that is not sparse puts its own attention in its place.

    case: says block size, rectification and order. Sparse modes keep exactly the nominal share of blocks: random
    weights make attention flat, where top-p would keep most of it. The others leave the text mask out: every text token
    is valid here, and without a mask dense attention is fastest. Returns the Handle.
    """
    from ..pipelines import enable as enable_attention

    config = config_at(mode.sparsity or 0.0, case.rectify).replace(block_size=case.block_size, order=case.order)
    handle = enable_attention(transformer, config, backend=mode.name if mode.kind == "sparse" else "auto")
    if mode.kind != "sparse":
        _replace_attention(transformer, BASELINES[mode.name].run if mode.kind == "dense" else _copy_v)
    return handle


def _replace_attention(transformer: Any, run: Attend) -> None:
    layers = [getattr(processor, "rectified_layer", None) for processor in transformer.attn_processors.values()]
    for layer in layers:
        if layer is not None:
            layer.attend = lambda q, k, v, *mask_and_scale: run(q, k, v)


def _copy_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.clone()
