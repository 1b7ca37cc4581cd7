"""What the attention calls of one layer did in one run."""

from collections import Counter, deque
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
