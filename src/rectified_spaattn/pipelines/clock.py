"""Which denoising step a forward of the transformer belongs to."""

import math
import weakref
from typing import Any

import torch

Step = tuple[int | None, int | None]
UNKNOWN: Step = (None, None)


class RunClock:
    """The denoising step, shared by the transformers of one pipeline.

    Steps count from 0 at the first step that a run makes, also where it begins inside the schedule (strength below 1);
    the two timesteps that a second-order scheduler visits are one step. The step is, best source first: what `tell`
    said; scheduler.step_index; for a scheduler without one (DDIM) the place of pipeline.current_timestep in its
    timesteps. A run starts where the scheduler got new timesteps, and where the step goes back.
    """

    def __init__(self, pipeline: Any | None) -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._told: Step | None = None
        self._timesteps: Any = None  # of the run; set_timesteps makes a new object every time
        self._begin: int | None = 0  # index of the run's first timestep, None until it can be known
        self._first_timestep: float | None = None  # what the transformer got in the run's first forward
        self._last: int | None = None
        self.run = 0
        self.problem = ""

    def tell(self, step: int, total: int | None) -> None:
        self._told = (step, total)

    def tells_steps(self) -> bool:
        """Whether there is a source for the step."""
        pipeline = self._alive()
        scheduler = getattr(pipeline, "scheduler", None)
        located = hasattr(scheduler, "timesteps") and hasattr(type(pipeline), "current_timestep")
        return self._told is not None or hasattr(scheduler, "step_index") or located

    def read(self, timestep: Any = None) -> Step:
        """(step, number of steps in this run), each None where nobody knows it; `problem` then says why.

        timestep: what the transformer is called with, a number or a tensor of any shape. It is read until the scheduler
        has moved, to notice a scheduler that does not drive these calls at all.
        """
        if self._told is not None:
            step = self._told[0]
            if step is not None and self._last is not None and step < self._last:
                self.run += 1
            self._last = step
            return self._told
        pipeline = self._alive()
        if not self.tells_steps():
            self.problem = (
                "no pipeline is enabled" if pipeline is None else _without_steps(getattr(pipeline, "scheduler", None))
            )
            return UNKNOWN
        return self._from_scheduler(pipeline, timestep)

    def _alive(self) -> Any:
        return self._pipeline() if self._pipeline is not None else None

    def _from_scheduler(self, pipeline: Any, timestep: Any) -> Step:
        scheduler = pipeline.scheduler
        timesteps, moved = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        begin = getattr(scheduler, "begin_index", None)
        index = moved
        if index is None:
            index = begin if begin is not None else _located(timesteps, getattr(pipeline, "current_timestep", None))
        back = index is not None and self._last is not None and index < self._last
        fresh = timesteps is not self._timesteps or back
        if fresh:
            self.run += 1
            self._timesteps, self._last, self._first_timestep = timesteps, None, _largest(timestep)
            self._begin = begin if begin is not None else index
        elif moved is None and hasattr(scheduler, "step_index") and _largest(timestep) != self._first_timestep:
            self.problem = _idle(scheduler)
            return UNKNOWN
        if index is None and not hasattr(scheduler, "step_index"):
            self.problem = _without_steps(scheduler)
            return UNKNOWN
        if moved is not None and self._last is None and begin is None and not fresh:
            self._begin = max(moved - 1, 0)  # exactly one step was made since the forward that could not know
        self._last = moved if hasattr(scheduler, "step_index") else index
        return self._relative(scheduler, index)

    def _relative(self, scheduler: Any, index: int | None) -> Step:
        begin, order = self._begin or 0, getattr(scheduler, "order", 1)
        step = 0 if index is None else (index - begin) // order
        if self._timesteps is None:
            return step, None
        if index is not None and index >= len(self._timesteps):
            self.problem = _idle(scheduler)
            return UNKNOWN
        return step, math.ceil((len(self._timesteps) - begin) / order)


def _located(timesteps: Any, current: Any) -> int | None:
    """Where `current` stands in timesteps; of two equal ones the second, as the schedulers themselves choose."""
    if timesteps is None or current is None or torch.as_tensor(current).numel() != 1:  # diffusion forcing: one a frame
        return None
    schedule = torch.as_tensor(timesteps)
    places = (schedule == torch.as_tensor(current, device=schedule.device)).nonzero().flatten().tolist()
    return places[min(1, len(places) - 1)] if places else None


def _largest(timestep: Any) -> float | None:
    # the largest: where an image fixes the first frame, its tokens have timestep 0
    return None if timestep is None else float(torch.as_tensor(timestep).max())


def _without_steps(scheduler: Any) -> str:
    return (
        f"{type(scheduler).__name__} has no step_index, and its pipeline no current_timestep that is in its timesteps"
    )


def _idle(scheduler: Any) -> str:
    return (
        f"the {type(scheduler).__name__} of the enabled pipeline does not move with these calls: another pipeline or "
        "scheduler drives the transformer, or one for each frame"
    )
