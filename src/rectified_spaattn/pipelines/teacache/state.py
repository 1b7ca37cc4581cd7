"""What TeaCache remembers of one guidance call between denoising steps."""

from dataclasses import dataclass

import torch

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

    def must_compute(self, signal: torch.Tensor, fit: Fit, threshold: float) -> bool:
        """Take the signal of a step that may be skipped, and say whether its blocks have to run all the same."""
        previous, self.signal = self.signal, signal
        if previous is None or previous.shape != signal.shape:
            return True
        change = (signal - previous).abs().mean(dtype=torch.float32) / previous.abs().mean(dtype=torch.float32)
        self.accumulated += fit.distance(change.item())
        return max(self.accumulated, 0.0) >= threshold  # fits are below zero for tiny changes; 0 computes every step

    def computed(self, signal: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Take what a computed step gave. residual: None where no step can need it."""
        self.signal, self.residual, self.accumulated = signal, residual, 0.0
