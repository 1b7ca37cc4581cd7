"""Notices, before each forward of a transformer, what does not go as it was configured."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .processor import is_wrapped
from .state import TransformerState


@dataclass
class Watch:
    """The transformers of one pipeline, and what was said about them already: each thing is said once."""

    states: dict[str, TransformerState] = field(default_factory=dict)
    said: set[Hashable] = field(default_factory=set)

    def complaints(self, name: str, model: nn.Module, originals: list[tuple[Any, Any]]) -> list[str]:
        """What to warn of now that a forward of the transformer `name` begins."""
        found = [
            self._lost_layers(name, model, originals),
            self._uncalled_layers(name, model, originals),
            self._unknown_step(name),
            self._too_small_grid(name),
            *(self._all_steps_dense(each, name) for each in self.states),
        ]
        return [message for message in found if message is not None]

    def _once(self, key: Hashable) -> bool:
        if key in self.said:
            return False
        self.said.add(key)
        return True

    def _lost_layers(self, name: str, model: nn.Module, originals: list[tuple[Any, Any]]) -> str | None:
        lost = lost_layers(model, self.states[name], originals)
        if not lost or not self._once(("lost", *lost)):
            return None
        return (
            f"{len(lost)} of {len(originals)} layers of {name} run without rectified attention, because their "
            f"processor, its backend or the module was replaced after enable(): {shortened(lost)}. "
            "Disable and enable again."
        )

    def _uncalled_layers(self, name: str, model: nn.Module, originals: list[tuple[Any, Any]]) -> str | None:
        state = self.states[name]
        # the forward that begins now is counted already
        uncalled = uncalled_layers(model, state, originals) if state.forwards > 1 else []
        if not uncalled or not self._once(("uncalled", *uncalled)):
            return None
        return (
            f"{len(uncalled)} of {len(originals)} layers of {name} have called no attention since enable(): "
            f"{shortened(uncalled)}. Either a hook skips them, or their processor computes attention without "
            "diffusers' dispatch_attention_fn, so nothing of it is sparse: put a stock processor there before enable()."
        )

    def _unknown_step(self, name: str) -> str | None:
        state = self.states[name]
        if state.step is not None or not state.config.dense_steps or not self._once("step"):
            return None
        return (
            f"dense_steps={state.config.dense_steps} needs the denoising step, but {state.clock.problem}. Every such "
            "step is sparse. Enable on the pipeline you call, tell each step with handle.set_step(step, total), or "
            "pass dense_steps=0."
        )

    def _too_small_grid(self, name: str) -> str | None:
        state = self.states[name]
        tokens, block = math.prod(state.grid or ()), state.config.block_size
        if tokens >= block or not self._once(("grid", name, state.grid)):
            return None
        return (
            f"{name} runs full attention only: its grid {state.grid} holds {tokens} tokens, less than one block of "
            f"{block}. Pass a smaller block_size (a multiple of 16), or make the video larger."
        )

    def _all_steps_dense(self, name: str, begun: str) -> str | None:
        """Of the transformer that begins its share of a run now, and of the one whose share ends thereby."""
        state, now = self.states[name], self.states[begun]
        end = now.total_steps if state is now else now.first_step
        if end is None or state.first_step is None or state.run != now.run or state.total_steps is None:
            return None
        steps, dense = end - state.first_step, state.config.dense_step_count(state.total_steps)
        if not 0 < steps <= dense or not self._once(("dense", name, state.total_steps)):
            return None
        return (
            f"nothing runs sparse in {name}: dense_steps={state.config.dense_steps} is {dense} dense step(s), and it "
            f"has {steps} of the {state.total_steps} step(s) of this run. Allowed: {steps - 1} or fewer. "
            "Enable again with dense_steps=0, say, or with a fraction (0.1 is 5 of 50 steps, 1 of 8 and "
            "0 of 4), or take more steps."
        )


def lost_layers(model: nn.Module, state: TransformerState, originals: list[tuple[Any, Any]]) -> list[str]:
    """Names of layers that somebody took away after enabling. originals: (module, processor it had)."""
    return [
        layer.name
        for layer, (module, _) in zip(state.layers, originals, strict=True)
        if not is_wrapped(module.processor, layer) or not _is_at(model, layer.name.partition(".")[2], module)
    ]


def uncalled_layers(model: nn.Module, state: TransformerState, originals: list[tuple[Any, Any]]) -> list[str]:
    """Names of layers that nobody took away, but that have called no attention since they were enabled."""
    silent = [layer.name for layer in state.layers if not layer.called]
    lost = lost_layers(model, state, originals) if silent else []
    return [name for name in silent if name not in lost]


def _is_at(model: nn.Module, path: str, module: nn.Module) -> bool:
    found: nn.Module | None = model
    for part in path.split("."):
        found = _child(found, part)
    return found is module


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    # by its registration: a cache may hide the blocks behind attributes while a forward runs
    children = {} if module is None else module._modules
    if name not in children and "_orig_mod" in children:  # a block inside torch.compile(block)
        return _child(children["_orig_mod"], name)
    return children.get(name)


def shortened(names: list[str]) -> str:
    """The first three of a list of names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
