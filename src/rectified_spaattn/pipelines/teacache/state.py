"""What TeaCache remembers of one guidance call between denoising steps."""

from dataclasses import dataclass

import torch

from .models import Fit


@dataclass
class Branch:
    """One guidance call of a transformer, from step to step.

    signal       of the last step, computed or not
    residual     output of the last block minus input of the first, of the last computed step: [B, S, C]
    latents      shape of the latents that it is for
    accumulated  predicted change since the last computed step
    first, step  the first and the last step seen without a gap
    timestep     what the transformer got at the last step
    open         a forward has begun and not ended: after an interruption it stays so
    """

    signal: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    latents: torch.Size | None = None
    accumulated: float = 0.0
    first: int | None = None
    step: int | None = None
    timestep: float | None = None
    open: bool = False

    def arrive(self, step: int, timestep: float, latents: torch.Size) -> bool:
        """Begin a forward. What another run, an interrupted forward, or steps without it left behind is forgotten.

        Returns whether the first step came again: a run that was interrupted there starts over. Raises ValueError
        where a later step did.
        """
        interrupted = self.open
        again = not interrupted and step == self.step and timestep == self.timestep
        if again and step != self.first:
            raise ValueError("called twice")
        # a second-order scheduler calls twice at one step, with two timesteps
        if interrupted or again or self.step is None or step not in (self.step, self.step + 1):
            self.signal = self.residual = None
            self.accumulated, self.first = 0.0, step
        if latents != self.latents:
            self.signal = self.residual = None
        self.step, self.timestep, self.latents, self.open = step, timestep, latents, True
        return again

    def must_compute(self, signal: torch.Tensor, fit: Fit, threshold: float) -> bool:
        """Take the signal of a step that may be skipped, and say whether its blocks have to run all the same."""
        previous, self.signal = self.signal, signal
        if previous is None or previous.shape != signal.shape:
            return True
        self.accumulated += fit.distance(relative_change(signal, previous))
        return max(self.accumulated, 0.0) >= threshold  # fits are below zero for tiny changes; 0 computes every step

    def computed(self, signal: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Take what a computed step gave. residual: None where no step can need it."""
        self.signal, self.residual, self.accumulated = signal, residual, 0.0


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """mean|new - old| / mean|old|, summed in float32."""
    change = (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)
    return change.item()
