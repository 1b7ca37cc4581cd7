"""What stands in for the blocks of a transformer during one pass."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from .models import Arguments, CachedModel


@dataclass(kw_only=True)
class Pass:
    """One pass through a transformer, with its blocks or without. Tensors of blocks: [B, S, C].

    residual  what the blocks added at an earlier step: they are left out and it is added again. None: they run
    signal    what tells how much changed, of this pass
    start     input of the first block, this rank's part where processes share the model
    end       output of the last block, where the blocks ran
    """

    residual: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    start: torch.Tensor | None = None
    end: torch.Tensor | None = None


@dataclass(kw_only=True)
class StandIn:
    """Called in place of one block: runs it, or hands its input on where the blocks are left out.

    It stands outside of the block, so code compiled for the block stays as it is. The last one gives out first input +
    residual whatever it got: what a ControlNet adds between blocks is in the residual already. torch.compile may trace
    it: whether the blocks run is known before the pass.

    parameters     names of the arguments of the block's forward
    hidden, text   places of the hidden states and of the text in the block's output; text is None where it gives none
    signal         the signal from the block's arguments; of the first block alone
    """

    block: nn.Module
    now: Pass
    parameters: tuple[str, ...]
    hidden: int
    text: int | None
    signal: Callable[[Arguments], torch.Tensor] | None
    is_last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        hidden, now = arguments["hidden_states"], self.now
        if self.signal is not None:
            now.start = part_of_rank(self.block, hidden)
            now.signal = self.signal({**arguments, "hidden_states": now.start})
        if now.residual is None:
            output = self.block(*args, **kwargs)
            if self.is_last:
                now.end = output[self.hidden] if isinstance(output, tuple) else output
            return output
        if self.is_last and now.start is not None:
            hidden = now.start + now.residual
        if self.text is None:
            return hidden
        both = (hidden, arguments["encoder_hidden_states"])
        return both if self.hidden == 0 else both[::-1]


def part_of_rank(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a block makes of its hidden states where context parallelism cuts them at its entrance."""
    hooks: Any = getattr(getattr(block, "_diffusers_hook", None), "hooks", {})
    for hook in hooks.values():
        if isinstance(hook, ContextParallelSplitHook) and "hidden_states" in hook.metadata:
            hidden = hook._prepare_cp_input(hidden, hook.metadata["hidden_states"])
    return hidden


def stand_ins(model: nn.Module, row: CachedModel, now: Pass) -> dict[str, list[StandIn]]:
    """One for each block, by the attribute that holds the list."""
    children: dict[str, Any] = dict(model.named_children())
    blocks = [(name, block) for name in row.blocks for block in children[name]]
    lists: dict[str, list[StandIn]] = {name: [] for name in row.blocks}
    for place, (name, block) in enumerate(blocks):
        inner = unwrap_module(block)
        places = TransformerBlockRegistry.get(type(inner))
        lists[name].append(
            StandIn(
                block=block,
                now=now,
                parameters=tuple(inspect.signature(type(inner).forward).parameters)[1:],
                hidden=places.return_hidden_states_index,
                text=places.return_encoder_hidden_states_index,
                signal=row.signal(inner) if place == 0 else None,
                is_last=place == len(blocks) - 1,
            )
        )
    return lists
