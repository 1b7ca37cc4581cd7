"""What one run did: the attention calls of a layer, and when it began and ended."""

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_PROBED = 1000  # calls of a layer whose errors are kept


@dataclass
class Record:
    """Calls of one layer in one run. Tensors stay on the device: no synchronisation.

    density  a running sum
    probes   of the last calls: the error of every head, and whether it kept all that max_density allows; [B, H] each
    """

    sparse: int = 0
    density: torch.Tensor | float = 0.0
    dense: Counter[str] = field(default_factory=Counter)
    backends: set[str] = field(default_factory=set)
    probes: deque[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=lambda: deque(maxlen=_PROBED))

    def add(self, density: torch.Tensor) -> None:
        """A sparse call."""
        self.sparse += 1
        self.density = self.density + density


@dataclass(kw_only=True, eq=False)
class RunSpan:
    """began: when the first forward did, by time.perf_counter; ended: when the last one came to its end."""

    devices: set[torch.device] = field(default_factory=set)
    began: float | None = None
    ended: float | None = None

    def begin_forward(self) -> None:
        if self.began is None:
            self.began = time.perf_counter()

    def end_forward(self) -> None:
        self.ended = time.perf_counter()


def seconds_of(spans: Sequence[RunSpan]) -> float:
    """From the first beginning to the last end; NaN where no forward came to its end."""
    began = [span.began for span in spans if span.began is not None]
    ended = [span.ended for span in spans if span.ended is not None]
    return max(ended) - min(began) if began and ended else math.nan


def devices_of(spans: Sequence[RunSpan]) -> tuple[str, ...]:
    """What they call themselves, where PyTorch knows; else their type."""
    devices = {device for span in spans for device in span.devices}
    return tuple(sorted({torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices}))
