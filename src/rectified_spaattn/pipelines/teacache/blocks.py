"""What stands in for the blocks of a transformer during one forward."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from .models import Arguments, CachedModel, Fit
from .state import Branch


@dataclass(kw_only=True)
class Forward:
    """One forward of a transformer.

    forced   the step is computed whatever the signal says
    start    input of the first block: [B, S, C]
    skipped  whether the blocks are left out; None until the first one was reached
    """

    branch: Branch
    forced: bool
    fit: Fit
    threshold: float
    signal: Callable[[nn.Module, Arguments], torch.Tensor]
    start: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    skipped: bool | None = None

    def enter(self, block: nn.Module, arguments: Arguments) -> None:
        """At the first block: decide."""
        self.start = arguments["hidden_states"]
        signal = self.signal(block, arguments).detach()
        compute = self.branch.must_compute(signal, self.start.shape, self.forced, self.fit, self.threshold)
        self.skipped = not compute

    def leave(self, end: torch.Tensor) -> None:
        """After the last computed block: keep what the blocks added."""
        self.branch.residual = (end - self.start).detach()


@dataclass(kw_only=True)
class StandIn:
    """Called in place of one block: runs it, or hands its input on where the step is skipped.

    It stands outside of the block, so code compiled for the block stays as it is. The last one gives out first input +
    residual whatever it got: what a ControlNet adds between blocks is in the residual already.
    """

    block: nn.Module
    forward: Forward
    is_first: bool
    is_last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(unwrap_module(self.block))
        index = TransformerBlockRegistry.get(kind)
        if self.is_first:
            self.forward.enter(unwrap_module(self.block), _by_name(kind, args, kwargs))
        if not self.forward.skipped:
            result = self.block(*args, **kwargs)
            if self.is_last:
                self.forward.leave(result[index.return_hidden_states_index] if isinstance(result, tuple) else result)
            return result
        arguments = _by_name(kind, args, kwargs)
        hidden = arguments["hidden_states"]
        if self.is_last and self.forward.branch.residual is not None:
            hidden = self.forward.start + self.forward.branch.residual
        if index.return_encoder_hidden_states_index is None:
            return hidden
        both = {
            index.return_hidden_states_index: hidden,
            index.return_encoder_hidden_states_index: arguments["encoder_hidden_states"],
        }
        return both[0], both[1]


def stand_ins(model: nn.Module, row: CachedModel, forward: Forward) -> dict[str, list[StandIn]]:
    """One for each block, by the attribute that holds the list."""
    names = [(name, i) for name in row.blocks for i in range(len(getattr(model, name)))]
    made: dict[str, list[StandIn]] = {name: [] for name in row.blocks}
    for name, i in names:
        block = getattr(model, name)[i]
        made[name].append(
            StandIn(block=block, forward=forward, is_first=(name, i) == names[0], is_last=(name, i) == names[-1])
        )
    return made


def _by_name(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return inspect.signature(kind.forward).bind(None, *args, **kwargs).arguments
