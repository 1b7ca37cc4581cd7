"""Which denoising step a forward of the transformer belongs to."""

import math
import threading
import weakref
from typing import Any

import torch

Step = tuple[int | None, int | None]
UNKNOWN: Step = (None, None)
_TURNS = "two timesteps came at one step of the enabled pipeline's scheduler: pipelines take turns on the transformer"


class RunClock:
    """The denoising step, shared by the transformers of one pipeline.

    It follows the pipeline that it was made for, and no other: its scheduler's step_index, or for a scheduler without
    one (DDIM) the place of the pipeline's current_timestep in the timesteps. Steps count from 0 at the first step that
    a run makes, also where it begins inside the schedule (strength below 1); the two timesteps that a second-order
    scheduler visits are one step. A run starts where the scheduler got new timesteps, and where the step goes back.

    A step that `tell` says goes before, until `tell(None)` or until that scheduler moves on: a run of the pipeline
    counts for itself. `run` numbers the runs; `problem` says why the last step read is unknown; `conflict`, whether
    that is because others call the transformer in this run; `is_told`, whether `tell` said it.
    """

    def __init__(self, pipeline: Any | None) -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._kind = type(pipeline).__name__
        self._lock = threading.RLock()
        self._told: Step | None = None
        self._told_at: tuple[Any, ...] = ()
        self._step: int | None = None  # the last one read, whoever said it
        self._timesteps: Any = None  # of the run; set_timesteps makes a new object every time
        self._thread: int | None = None  # in which the run began
        self._begin: int | None = 0  # index of the run's first timestep, None until it can be known
        self._first_timestep: float | None = None  # what the transformer got in the run's first forward
        self._last: int | None = None
        self._arrived: tuple[int | None, Any] = (None, None)  # index, and what the transformer got there
        self.run = 0
        self.problem = ""
        self.conflict = False

    @property
    def is_told(self) -> bool:
        return self._told is not None

    def tell(self, step: int | None, total: int | None = None) -> None:
        """Say the step of the forwards to come; None: nobody tells it any more."""
        with self._lock:
            continues = self._step is not None and step is not None and step - self._step in (0, 1)
            if step is not None and self._told is None and not continues:
                self.run += 1
            self._told = None if step is None else (step, total)
            self._told_at = self._place()

    def tells_steps(self) -> bool:
        """Whether there is a source for the step."""
        pipeline = self._alive()
        scheduler = getattr(pipeline, "scheduler", None)
        located = hasattr(scheduler, "timesteps") and hasattr(type(pipeline), "current_timestep")
        return self._told is not None or hasattr(scheduler, "step_index") or located

    def read(self, timestep: Any = None, *, exact: bool = False) -> Step:
        """(step, number of steps in this run), each None where nobody knows it; `problem` then says why.

        timestep: what the transformer is called with, a number or a tensor of any shape. It is read until the scheduler
        has moved, to notice a scheduler that does not drive these calls at all; with `exact` later, too, where two
        calls come at one step, to notice calls of another pipeline between those of this one.
        """
        with self._lock:
            self.conflict = False
            if self._told is not None and not _same(self._told_at, self._place()):
                self._told = None
            if self._told is not None:
                step, total = self._told
                if step is not None and self._step is not None and step < self._step:
                    self.run += 1
            else:
                step, total = self._of_the_pipeline(timestep, exact)
            if step is not None:
                self._step = step
            return step, total

    def _of_the_pipeline(self, timestep: Any, exact: bool) -> Step:
        pipeline = self._alive()
        if self._pipeline is None:
            self.problem = "no pipeline is enabled"
        elif pipeline is None:
            self.problem = (
                f"the {self._kind} that was enabled, whose scheduler is followed, is gone: keep it, or disable and "
                "enable on the pipeline that you call"
            )
        elif not self.tells_steps():
            self.problem = _without_steps(getattr(pipeline, "scheduler", None))
        else:
            return self._from_scheduler(pipeline, timestep, exact)
        return UNKNOWN

    def _alive(self) -> Any:
        return self._pipeline() if self._pipeline is not None else None

    def _place(self) -> tuple[Any, ...]:
        """Where the pipeline's scheduler stands."""
        pipeline = self._alive()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps, index = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        return timesteps, index, None if index is not None else getattr(pipeline, "current_timestep", None)

    def _from_scheduler(self, pipeline: Any, timestep: Any, exact: bool) -> Step:
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
            self._thread, self._arrived = threading.get_ident(), (None, None)
        elif self._thread not in (None, threading.get_ident()) and not _finished(timesteps, index):
            self.conflict = True
            self.problem = f"the run of the enabled {self._kind} began in another thread"
            return UNKNOWN
        elif moved is None and hasattr(scheduler, "step_index") and _largest(timestep) != self._first_timestep:
            self.problem = _idle(scheduler)
            return UNKNOWN
        if index is None and not hasattr(scheduler, "step_index"):
            self.problem = _without_steps(scheduler)
            return UNKNOWN
        if exact and not _finished(timesteps, index) and not self._arrives_once(scheduler, index, timestep):
            self.conflict = moved is not None
            self.problem = _TURNS if self.conflict else _idle(scheduler)
            return UNKNOWN
        if moved is not None and self._last is None and begin is None and not fresh:
            self._begin = max(moved - 1, 0)  # exactly one step was made since the forward that could not know
        self._last = moved if hasattr(scheduler, "step_index") else index
        return self._relative(scheduler, index)

    def _arrives_once(self, scheduler: Any, index: int | None, timestep: Any) -> bool:
        """Whether the transformer gets one timestep wherever the scheduler stands.

        What the scheduler itself made needs no look; other values are read where two meet, which waits for the device.
        """
        before, value = self._arrived
        if index is None or before != index:
            self._arrived = index, timestep
            return True
        both_its_own = _is_part(timestep, self._timesteps) and _is_part(value, self._timesteps)
        return (both_its_own and hasattr(scheduler, "step_index")) or _largest(timestep) == _largest(value)

    def _relative(self, scheduler: Any, index: int | None) -> Step:
        begin, order = self._begin or 0, getattr(scheduler, "order", 1)
        step = 0 if index is None else (index - begin) // order
        if self._timesteps is None:
            return step, None
        if _finished(self._timesteps, index):
            self.problem = _idle(scheduler)
            return UNKNOWN
        return step, math.ceil((len(self._timesteps) - begin) / order)


def _finished(timesteps: Any, index: int | None) -> bool:
    return timesteps is not None and index is not None and index >= len(timesteps)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(a is b or (isinstance(a, int) and a == b) for a, b in zip(one, other, strict=True))


def _located(timesteps: Any, current: Any) -> int | None:
    """Where `current` stands in timesteps; of two equal ones the second, as the schedulers themselves choose."""
    if timesteps is None or current is None:
        return None
    schedule, wanted = torch.as_tensor(timesteps, device="cpu"), torch.as_tensor(current, device="cpu")
    if wanted.numel() != 1:  # diffusion forcing: one a frame
        return None
    places = (schedule == wanted).nonzero().flatten().tolist()
    return places[min(1, len(places) - 1)] if places else None


def _is_part(one: Any, other: Any) -> bool:
    """Whether two tensors share their storage."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.device != other.device:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _largest(timestep: Any) -> float | None:
    # the largest: where an image fixes the first frame, its tokens have timestep 0
    if timestep is None or isinstance(timestep, int | float):
        return timestep
    return float(torch.as_tensor(timestep, device="cpu").max())


def _without_steps(scheduler: Any) -> str:
    return (
        f"{type(scheduler).__name__} has no step_index, and its pipeline no current_timestep that is in its timesteps"
    )


def _idle(scheduler: Any) -> str:
    return (
        f"the {type(scheduler).__name__} of the enabled pipeline does not move with these calls: another pipeline or "
        "scheduler drives the transformer, or one for each frame"
    )
