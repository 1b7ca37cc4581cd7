"""Handle: what enable gives back. It counts, reports and undoes."""

from contextlib import AbstractContextManager
from numbers import Integral
from typing import Any

from ..config import SparseConfig
from .attachment import Attachment
from .clock import RunClock
from .stats import RunStats, enabled_word, run_stats, run_summary, settings_line
from .watch import Watch


class Handle(AbstractContextManager["Handle"]):
    """Rectified attention enabled on a pipeline or a transformer. Also a context manager that disables on exit.

    It keeps figures, and nothing of the model; what is enabled stays so without it, until disable(pipe).
    """

    def __init__(self, attachments: list[Attachment], clock: RunClock, watch: Watch) -> None:
        self._enabled = attachments
        self._clock = clock
        self._watch = watch

    def __repr__(self) -> str:
        """Which transformers, whether they are enabled, and with what; nothing waits for the device."""
        return (
            "\n".join([f"<Handle, {enabled_word(self._watch.states)}", *map(settings_line, self._watch.states)]) + ">"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """What a deep copy of a pipeline gets that carries it: the copy is disabled, so this is a handle of nothing."""
        return Handle([], RunClock(None), Watch())

    @property
    def active(self) -> bool:
        """Whether any transformer is still enabled."""
        return any(state.active for state in self._watch.states)

    def __exit__(self, *error: object) -> None:
        self.disable()

    def disable(self) -> None:
        """Put the model back as it was; processors that somebody replaced since stay. Safe to call twice."""
        for attachment in self._enabled:
            attachment.detach()

    def set_step(self, step: int | None, total: int | None = None) -> None:
        """Say which denoising step comes next, where no pipeline's scheduler tells. step: 0 .. total - 1.

        It holds for the forwards that follow, until the next set_step, until set_step(None), or until the scheduler of
        the enabled pipeline moves on: a run of that pipeline counts its own steps, and warms up.
        """
        if step is not None and (not is_int(step) or step < 0):
            raise ValueError(f"step: got {step!r}; allowed: an integer of 0 or more, or None to stop telling.")
        if total is not None and (step is None or not is_int(total) or total <= step):
            raise ValueError(f"total: got {total!r}; allowed: an integer above step = {step}, or None.")
        self._clock.tell(None if step is None else int(step), None if total is None else int(total))

    def configs(self) -> dict[str, SparseConfig]:
        """Transformer -> the config it runs with."""
        return {state.name: state.config for state in self._watch.states}

    def stats(self) -> RunStats:
        """Figures of the last run. Waits for the device."""
        return run_stats(self._watch.states)

    def summary(self) -> str:
        """A table of what ran sparse, how densely and where, of what ran dense and why, and of what was lost since."""
        return run_summary(self._watch.states, self._watch)


def is_int(value: Any) -> bool:
    """Whether it is an integer of any kind, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
