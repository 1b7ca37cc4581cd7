"""What TeaCache remembers between denoising steps."""

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn

from ..state import RunClock
from .models import Fit

UNNAMED = "all"
"""The branch of a transformer that is called outside of cache_context."""


class Branch(BaseState):
    """One CFG branch of one transformer.

    signal       of the last step, computed or not
    residual     output of the last block minus input of the first, of the last computed step: [B, S, C]
    accumulated  predicted change since the last computed step
    first, step  the first and the last step seen without a gap
    timestep     what the transformer got at the last step
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.signal: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self.accumulated = 0.0
        self.first: int | None = None
        self.step: int | None = None
        self.timestep: float | None = None

    def arrive(self, step: int, timestep: float) -> bool:
        """Begin a forward. What another run, or steps without this branch, left behind is forgotten.

        Returns whether the first step came again: a run that was interrupted there starts over.
        """
        again = step == self.step and timestep == self.timestep
        if again and step != self.first:
            self.reset()
            raise RuntimeError(
                f"TeaCache: the transformer was called twice at step {step} in one branch, so two guidance calls would "
                "share a cache. Make each inside its own transformer.cache_context('cond') or "
                "cache_context('uncond'), or disable TeaCache."
            )
        # a second-order scheduler calls twice at one step, with two timesteps
        if again or self.step is None or step not in (self.step, self.step + 1):
            self.reset()
            self.first = step
        self.step, self.timestep = step, timestep
        return again

    def must_compute(self, signal: torch.Tensor, shape: torch.Size, forced: bool, fit: Fit, threshold: float) -> bool:
        """Take the signal of this step, and say whether its blocks have to run. shape: of their hidden states."""
        previous, self.signal = self.signal, signal
        if not forced and previous is not None and previous.shape == signal.shape and self.fits(shape):
            self.accumulated += fit.distance(relative_change(signal, previous))
            if max(self.accumulated, 0.0) < threshold:  # fits are below zero for tiny changes; 0 computes every step
                return False
        self.accumulated = 0.0
        return True

    def fits(self, shape: torch.Size) -> bool:
        """Whether there is a residual for hidden states of this shape."""
        return self.residual is not None and self.residual.shape == shape


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """mean|new - old| / mean|old|, summed in float32."""
    change = (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)
    return change.item()


class Progress:
    """Where the run of a pipeline is; shared by its transformers."""

    def __init__(self, clock: RunClock) -> None:
        self.clock = clock
        self.run = -1
        self._start = 0

    def read(self, timestep: float) -> tuple[int, int, int]:
        """(step, steps since the first of this run, number of steps). RuntimeError where nobody tells them.

        timestep: what the transformer is called with.
        """
        step, total = self.clock.read(timestep)
        if step is None or total is None:
            why = self.clock.problem or "the scheduler has no timesteps"
            raise RuntimeError(
                f"TeaCache: the denoising step and the number of steps are unknown ({why}). Enable it on the pipeline "
                "that drives the transformer, or call handle.set_step(step, total) before every step."
            )
        if self.run != self.clock.run:
            self.run, self._start = self.clock.run, step
        return step, step - self._start, total


class BranchHook(ModelHook):
    """Where diffusers tells the branch (cache_context), and the end of a run (reset_stateful_hooks)."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.branches = StateManager(Branch)

    def current(self) -> tuple[str, Branch]:
        if self.branches._context is not None:
            return self.branches.context.name, self.branches.get_state()
        self.branches.set_context(CacheContext(UNNAMED))
        branch = self.branches.get_state()
        self.branches.set_context(None)
        return UNNAMED, branch

    def forget(self) -> None:
        """Drop every branch; unlike reset_state, inside of a cache_context that goes on."""
        context = self.branches._context
        self.branches.reset()
        self.branches.set_context(context)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.branches.reset()
        return module
