"""Where the run of a pipeline is; shared by its transformers."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from ..clock import RunClock


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a forward is. run: its number. since_start: steps since the first that this run made. told: by set_step."""

    run: int
    step: int
    since_start: int
    total: int
    timestep: float
    told: int


class Progress:
    """Steps of one run. A run belongs to the thread that began it: two runs at once would read each other's step."""

    def __init__(self, clock: RunClock, pipeline: Any | None) -> None:
        self.clock = clock
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._told = 0
        self._run = -1
        self._start = 0
        self._thread: threading.Thread | None = None

    def tell(self, step: int | None, total: int | None) -> None:
        self._told += 1
        self.clock.tell(step, total)

    def read(self, timestep: float) -> Place:
        """The place of a forward with this timestep. RuntimeError where nobody tells it, or another thread runs."""
        step, total = self.clock.read(timestep)
        if step is None or total is None:
            raise RuntimeError(f"TeaCache: the denoising step and the number of steps are unknown ({self._why()}).")
        if self._run != self.clock.run:
            self._run, self._start, self._thread = self.clock.run, step, threading.current_thread()
        check_thread(self._thread)
        return Place(
            run=self._run,
            step=step,
            since_start=step - self._start,
            total=total,
            timestep=timestep,
            told=self._told,
        )

    def _why(self) -> str:
        if self._pipeline is not None and self._pipeline() is None:
            return (
                "the pipeline that TeaCache was enabled on is gone: from_pipe and a new pipeline have a schedule of their "
                "own. Call disable(), and enable_teacache on the pipeline that runs"
            )
        why = self.clock.problem or "the scheduler has no timesteps"
        return (
            f"{why}. Enable TeaCache on the pipeline that drives the transformer, or call handle.set_step(step, total) "
            "before every step"
        )


def check_thread(owner: threading.Thread | None) -> None:
    """RuntimeError where the transformer is at work for another thread that lives."""
    here = threading.current_thread()
    if owner is not None and owner is not here and owner.is_alive():
        raise RuntimeError(
            f"TeaCache: thread {here.name} calls the transformer in the middle of a run of thread {owner.name}, so the "
            "two would share a cache and a schedule. Give each thread a copy.deepcopy of the transformer with "
            "TeaCache of its own, make the runs one after the other, or disable TeaCache."
        )
