"""Notices, at the forwards of a transformer, what does not go as it was configured."""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import SparseConfig
from .forwards import ForwardState
from .hooks import living_hooks
from .processor import is_wrapped
from .state import TransformerState


@dataclass(kw_only=True, eq=False)
class Watch:
    """The transformers of one pipeline, and what was said about them already: each thing is said once."""

    pipeline: "weakref.ref[Any] | None" = None
    states: list[TransformerState] = field(default_factory=list)
    said: set[Hashable] = field(default_factory=set)

    def complaints(self, state: TransformerState, forward: ForwardState) -> list[str]:
        """What to warn of now that a forward of a transformer begins."""
        messages = [
            self._lost_layers(state),
            self._uncalled_layers(state),
            self._unknown_step(state, forward),
            self._too_small_grid(state, forward),
            *(self._all_steps_dense(each, state) for each in self.states),
        ]
        return [message for message in messages if message is not None] + self.replaced_transformers()

    def complaints_after(self, state: TransformerState, forward: ForwardState) -> list[str]:
        """What to warn of now that it ended."""
        if not forward.sparse or not saves(state.config):
            return []
        if not self._once(("all kept", state.name, forward.layout)):
            return []
        density = float(forward.density) / forward.sparse  # waits for the device, once a grid
        if density < ALL_KEPT:
            return []
        return [f"{state.name}, {forward.layout.places}: {nothing_saved(state)}"]

    def replaced_transformers(self) -> list[str]:
        """Says once of each transformer that another one stands in its place."""
        replaced = [state.name for state in self.states if is_replaced(state, self.pipeline)]
        return [
            f"{name} of the pipeline is another object than the one that was enabled, so it runs full attention. "
            "Disable and enable again on the pipeline."
            for name in replaced
            if self._once(("replaced", name))
        ]

    def _once(self, key: Hashable) -> bool:
        if key in self.said:
            return False
        self.said.add(key)
        return True

    def _lost_layers(self, state: TransformerState) -> str | None:
        lost = lost_layers(state)
        if not lost or not self._once(("lost", *lost)):
            return None
        return (
            f"{len(lost)} of {len(state.layers)} layers of {state.name} run without rectified attention, because their "
            f"processor, its backend or the module was replaced after enable(): {shortened(lost)}. "
            "Disable and enable again."
        )

    def _uncalled_layers(self, state: TransformerState) -> str | None:
        uncalled = uncalled_layers(state) if state.completed else []
        if not uncalled or not self._once(("uncalled", *uncalled)):
            return None
        return (
            f"{len(uncalled)} of {len(state.layers)} layers of {state.name} have called no attention since enable(): "
            f"{shortened(uncalled)}. Either a hook skips them, or their processor computes attention without "
            "diffusers' dispatch_attention_fn, so nothing of it is sparse: put a stock processor there before enable()."
        )

    def _unknown_step(self, state: TransformerState, forward: ForwardState) -> str | None:
        last = state.config.dense_last_steps
        if forward.step is not None and forward.total is None and last and self._once("total"):
            return (
                f"dense_last_steps={last} needs the number of steps, which nobody tells: the last ones are sparse. "
                "Enable on the pipeline you call, or tell each step with handle.set_step(step, total)."
            )
        if forward.step is not None or not state.needs_steps or not self._once("step"):
            return None
        return (
            f"{state.steps_wanted} needs the denoising step, but {forward.problem}. Every such step is sparse. "
            "Enable on the pipeline you call, tell each step with handle.set_step(step, total), or pass dense_steps=0."
        )

    def _too_small_grid(self, state: TransformerState, forward: ForwardState) -> str | None:
        layout, block = forward.layout, state.config.block_size
        if layout.video >= block or not self._once(("grid", state.name, layout.places)):
            return None
        return (
            f"{state.name} runs full attention only: its {layout.places} holds {layout.video} tokens, less than one "
            f"block of {block}. Pass a smaller block_size (a multiple of 16), or make the video larger."
        )

    def _all_steps_dense(self, state: TransformerState, begun: TransformerState) -> str | None:
        """Of the transformer that begins its share of a run now, and of the one whose share ends thereby."""
        end = begun.last_total if state is begun else begun.first_step
        total = state.last_total
        if end is None or state.first_step is None or state.run != begun.run or total is None:
            return None
        steps, dense = end - state.first_step, state.config.dense_step_count(total)
        last = total - state.config.dense_last_step_count(total)  # the first of the dense last steps
        dense += max(0, end - max(last, state.first_step))
        if not 0 < steps <= dense or not self._once(("dense", state.name, total)):
            return None
        return (
            f"nothing runs sparse in {state.name}: {state.steps_wanted} is {dense} dense step(s), "
            f"and it has {steps} of the {total} step(s) of this run. Allowed: {steps - 1} or fewer. "
            "Enable again with dense_steps=0, say, or with a fraction (0.1 is 5 of 50 steps, 1 of 8 and "
            "0 of 4), or take more steps."
        )


ALL_KEPT = 0.9995
"""Mean density from which on a forward computed everything."""


def saves(config: SparseConfig) -> bool:
    """Whether it asks for fewer blocks than all, however large the error."""
    return config.sparsity > 0 and config.tolerance is None


def nothing_saved(state: TransformerState) -> str:
    """Why every block is kept, and what to do."""
    config = state.config
    return (
        f"every block is kept though sparsity={config.sparsity:g} asks for fewer, so nothing is saved. top_p="
        f"{config.top_p:g}, neighbours={config.neighbours} and few blocks of {config.block_size} tokens keep more than "
        "sparsity says: lower top_p (0 keeps what sparsity says), pass neighbours=False or a smaller block_size, or "
        "make the video larger."
    )


def lost_layers(state: TransformerState) -> list[str]:
    """Names of layers that somebody took away after enabling."""
    model = state.model()
    if model is None:
        return []
    return [
        layer.name
        for layer in state.layers
        if (module := layer.module()) is None
        or not is_wrapped(module.processor, layer)
        or not _is_at(model, layer.name.partition(".")[2], module)
    ]


def uncalled_layers(state: TransformerState) -> list[str]:
    """Names of layers that nobody took away, but that have called no attention since they were enabled."""
    silent = [layer.name for layer in state.layers if not layer.called]
    lost = lost_layers(state) if silent else []
    return [name for name in silent if name not in lost]


def is_replaced(state: TransformerState, pipeline: "weakref.ref[Any] | None") -> bool:
    """Whether the pipeline now has another transformer in place of the one that was enabled."""
    model, owner = state.model(), pipeline() if pipeline is not None else None
    other = getattr(owner, state.name, None)
    if not state.active or not isinstance(other, nn.Module) or other is model:
        return False
    # torch.compile and others put a module around it; another one may be enabled, too
    return not any(module is model or living_hooks(module) for module in other.modules())


def _is_at(model: nn.Module, path: str, module: nn.Module) -> bool:
    place: nn.Module | None = model
    for part in path.split("."):
        place = _child(place, part)
    return place is module


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    # by its registration: a cache may hide the blocks behind attributes while a forward runs
    children = {} if module is None else module._modules
    if name not in children and "_orig_mod" in children:  # a block inside torch.compile(block)
        return _child(children["_orig_mod"], name)
    return children.get(name)


def shortened(names: list[str]) -> str:
    """The first three of a list of names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
