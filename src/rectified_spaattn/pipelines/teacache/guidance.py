"""Which guidance call a forward is, named by cache_context or told by its text and its place within the step, and what
TeaCache remembers of it between steps.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

from ..ranks import Ranks
from .models import Fit
from .progress import Place


@dataclass
class Branch:
    """One guidance call of a transformer, from step to step.

    signal       of the last step, computed or not
    residual     output of the last block minus input of the first, of the last computed step: [B, S, C]
    latents      shape of the latents that it is for
    accumulated  predicted change since the last computed step
    first, step  the first and the last step seen without a gap
    timestep     what the transformer got at the last step
    told         how often set_step had been called then
    open         a forward has begun and not ended: after an interruption it stays so
    """

    signal: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    latents: torch.Size | None = None
    accumulated: float = 0.0
    first: int | None = None
    step: int | None = None
    timestep: float | None = None
    told: int = 0
    open: bool = False

    def arrive(self, place: Place, latents: torch.Size) -> None:
        """Begin a forward. What another run, an interrupted forward, or steps without it left behind is forgotten.

        Raises ValueError where a forward comes again, unless the first does or set_step was called: that starts over.
        """
        again = place.step == self.step and place.timestep == self.timestep
        if again and not self.open and place.step != self.first and place.told == self.told:
            raise ValueError("called twice")
        # a second-order scheduler calls twice at one step, with two timesteps
        if self.open or again or self.step is None or place.step not in (self.step, self.step + 1):
            self.signal = self.residual = None
            self.accumulated, self.first = 0.0, place.step
        if latents != self.latents:
            self.signal = self.residual = None
        self.step, self.timestep, self.told = place.step, place.timestep, place.told
        self.latents, self.open = latents, True

    def must_compute(self, signal: torch.Tensor, fit: Fit, threshold: float, ranks: Ranks | None = None) -> bool:
        """Take the signal of a step that may be skipped, and say whether its blocks have to run all the same.

        ranks: the processes that share the model. Each has a part of the signal, or all of it; they decide alike.
        """
        previous, self.signal = self.signal, signal
        if previous is None or previous.shape != signal.shape:
            return True
        apart = torch.stack([x.abs().sum(dtype=torch.float32) for x in (signal - previous, previous)])
        if ranks is not None:
            apart = ranks.gather(apart).sum(0)
        change = apart[0] / apart[1]
        self.accumulated += fit.distance(change.item())
        return max(self.accumulated, 0.0) >= threshold  # fits are below zero for tiny changes; 0 computes every step

    def computed(self, signal: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Take what a computed step gave. residual: None where no step can need it."""
        self.signal, self.residual, self.accumulated = signal, residual, 0.0


class ContextName(StateManager):
    """The name that transformer.cache_context(...) gives, in each thread its own."""

    def __init__(self) -> None:
        super().__init__(Branch)
        self._local = threading.local()

    @property
    def name(self) -> str | None:
        return getattr(self._local, "name", None)

    def set_context(self, context: Any) -> None:
        self._local.name = getattr(context, "name", context)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.set_context(None)


class GuidanceHook(ModelHook):
    """Where diffusers tells the name of a guidance call (cache_context), and the end of a run (reset_state)."""

    _is_stateful = True

    def __init__(self, forget: Callable[[], None]) -> None:
        super().__init__()
        self.context = ContextName()
        self._forget = forget

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.context.reset()
        self._forget()
        return module


@dataclass(eq=False)
class Text:
    """One text that the transformer was called with outside of cache_context. calls: with it, in this step so far."""

    embedding: torch.Tensor | None
    branches: list[str] = field(default_factory=list)
    calls: int = 0
    step: int = 0


class GuidanceCalls:
    """The branches of one transformer in one run.

    Within cache_context a branch is a name. Outside of it a branch is a text, and how many calls of this step had that
    text before: guidance that leaves layers out calls twice with one text, always after the plain call. Such calls must
    have the same latents, or they are no guidance, and cannot be told apart from step to step.
    """

    def __init__(self) -> None:
        self.branches: dict[str, Branch] = {}
        self._texts: list[Text] = []
        self._moment: tuple[int, int, float] | None = None
        self._latents: torch.Tensor | None = None
        self._made = 0

    def named(self, name: str) -> Branch:
        return self.branches.setdefault(name, Branch())

    def unnamed(self, place: Place, latents: torch.Tensor, embedding: torch.Tensor | None) -> tuple[str, Text]:
        """The name of the branch, and its text, whose `calls` goes up by one once the forward is over.

        Raises ValueError where calls cannot be told apart.
        """
        moment = (place.told, place.step, place.timestep)
        if moment != self._moment:
            self._moment, self._latents = moment, latents.detach().clone()
            self._begin_step(place.step)
        text = next((each for each in self._texts if _equal(each.embedding, embedding)), None)
        if text is None:
            text = Text(None if embedding is None else embedding.detach().clone())
            self._texts.append(text)
        if text.calls and not _equal(self._latents, latents):
            raise ValueError("several latents")
        text.step = place.step
        if text.calls == len(text.branches):
            self._made += 1
            text.branches.append(f"call {self._made}")
        return text.branches[text.calls], text

    def _begin_step(self, step: int) -> None:
        for text in list(self._texts):
            text.calls = 0
            if text.step < step - 1:  # its branches would start anew
                self._texts.remove(text)
                for name in text.branches:
                    self.branches.pop(name, None)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
