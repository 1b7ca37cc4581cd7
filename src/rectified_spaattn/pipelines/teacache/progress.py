"""Where the run of a pipeline is; shared by its transformers."""

import threading
from typing import NamedTuple

from ..clock import RunClock


class Place(NamedTuple):
    """Where a forward is. run: its number. since_start: steps since the first that this run made. told: by set_step."""

    run: int
    step: int
    since_start: int
    total: int
    timestep: float
    told: int


class Progress:
    """Steps of one run. A run belongs to the thread that began it: two runs at once would read each other's step."""

    def __init__(self, clock: RunClock) -> None:
        self.clock = clock
        self._told = 0
        self._run = -1
        self._start = 0
        self._over = True
        self._thread: threading.Thread | None = None

    def tell(self, step: int | None, total: int | None) -> None:
        self._told += 1
        self.clock.tell(step, total)

    def read(self, timestep: float) -> Place:
        """The place of a forward with this timestep. RuntimeError where nobody tells it, or another thread runs."""
        step, total = self.clock.read(timestep, exact=True)
        if self.clock.conflict:
            raise RuntimeError(f"TeaCache: {self.clock.problem}. {ONE_THREAD}")
        if step is None or total is None:
            why = self.clock.problem or "the scheduler has no timesteps"
            raise RuntimeError(
                f"TeaCache: the denoising step and the number of steps are unknown ({why}). Enable TeaCache on the "
                "pipeline that drives the transformer, or call handle.set_step(step, total) before every step."
            )
        if self._run != self.clock.run or self._over:
            self._thread = threading.current_thread()
        if self._run != self.clock.run:
            self._run, self._start = self.clock.run, step
        check_thread(self._thread)
        self._over = step == total - 1
        return Place(self._run, step, step - self._start, total, timestep, self._told)


ONE_THREAD = (
    "Two threads would share a cache and a schedule. Give each a copy.deepcopy of the transformer with TeaCache of its "
    "own, make the runs one after the other, or disable TeaCache."
)


def check_thread(owner: threading.Thread | None) -> None:
    """RuntimeError where the transformer is at work for another thread that lives."""
    here = threading.current_thread()
    if owner is not None and owner is not here and owner.is_alive():
        raise RuntimeError(
            f"TeaCache: thread {here.name} calls the transformer in the middle of a run of thread {owner.name}. "
            f"{ONE_THREAD}"
        )
