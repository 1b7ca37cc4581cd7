"""What a run did, call by call: figures, text, and the values of a picture."""

import math
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..attention import SparseStats, percentiles

Cell = tuple[str, int | None]  # layer, step


@dataclass
class Tally:
    """Calls of one layer at one step. density: their sum; it stays on the device, so counting waits for nothing."""

    sparse: int = 0
    density: torch.Tensor | float = 0.0
    dense: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        """Mean density over all calls, dense ones counted as 1; NaN without any. Waits for the device."""
        calls = self.sparse + self.dense.total()
        return (float(self.density) + self.dense.total()) / calls if calls else math.nan


class Record:
    """What the attention calls of one run did.

    cells     calls of the video's self-attention, by layer and step
    others    calls that are none of the video's self-attention, by reason; they run dense
    backends  names of what attended
    errors    what probe rows measured in the last 1,000 sparse calls, float32 [B, H] each; empty without probe rows
    forwards  calls of the model, 0 where nobody counts them; skipped: those without the video's self-attention
    """

    def __init__(self) -> None:
        self.cells: dict[Cell, Tally] = {}
        self.others: Counter[str] = Counter()
        self.backends: set[str] = set()
        self.errors: deque[torch.Tensor] = deque(maxlen=1000)
        self.forwards = 0
        self.skipped = 0
        self._lock = threading.Lock()

    def note_sparse(self, layer: str, step: int | None, stats: SparseStats) -> None:
        with self._lock:
            tally = self.cells.setdefault((layer, step), Tally())
            tally.sparse += 1
            tally.density = tally.density + stats.device_density
            self.backends.add(stats.backend)
            if stats.probe is not None:
                self.errors.append(stats.probe.error)

    def calls(self, layer: str, step: int | None) -> int:
        """How many sparse calls a layer made at a step."""
        with self._lock:
            return self.cells.get((layer, step), Tally()).sparse

    def note_dense(self, layer: str, step: int | None, reason: str) -> None:
        with self._lock:
            self.cells.setdefault((layer, step), Tally()).dense[reason] += 1

    def note_other(self, reason: str) -> None:
        with self._lock:
            self.others[reason] += 1

    def note_forward(self, calls: int) -> None:
        """calls: how many calls of the video's self-attention it made."""
        with self._lock:
            self.forwards += 1
            self.skipped += calls == 0

    @property
    def sparse(self) -> int:
        return sum(tally.sparse for tally in self.cells.values())

    @property
    def dense_reasons(self) -> dict[str, int]:
        reasons: Counter[str] = Counter()
        for tally in self.cells.values():
            reasons.update(tally.dense)
        return dict(reasons)

    @property
    def density(self) -> float:
        """Mean over the sparse calls, NaN without any. Waits for the device."""
        return sum(float(tally.density) for tally in self.cells.values()) / self.sparse if self.sparse else math.nan

    @property
    def layers(self) -> list[str]:
        """In the order of their first calls."""
        return list(dict.fromkeys(layer for layer, _ in self.cells))

    @property
    def steps(self) -> list[int | None]:
        """In the order of their first calls."""
        return list(dict.fromkeys(step for _, step in self.cells))

    def table(self) -> torch.Tensor:
        """float32 [layers, steps] on the CPU: mean density of the calls there, NaN where there was none."""
        rows = [[self.cells.get((layer, step), Tally()).mean for step in self.steps] for layer in self.layers]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(self.layers), len(self.steps))

    def summary(self, settings: str) -> str:
        """A few lines on what ran sparse, how densely and where, and on what ran dense and why."""
        return "\n".join([f"Rectified SpaAttn: {settings}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        if not self.cells and not self.others and not self.forwards:
            yield "  nothing has run yet"
            return
        dense = self.dense_reasons
        calls = self.sparse + sum(dense.values())
        skipped = f" ({self.skipped} without attention, as a cache skips it)" if self.skipped else ""
        forwards = f"{self.forwards} forwards{skipped}, " if self.forwards else ""
        yield f"  last run: {len(self.steps)} steps, {forwards}{calls} self-attention calls"
        if self.sparse:
            names = ", ".join(sorted(self.backends))
            yield f"  sparse: {self.sparse} calls, density {self.density:.1%}, backend {names}"
        else:
            yield "  sparse: none"
        if self.errors:
            errors = torch.cat([each.flatten().cpu() for each in self.errors])
            median, high = percentiles(errors)
            yield f"  error of probe rows: median {median:.3f}, 99th percentile {high:.3f}"
        for reason, count in sorted(dense.items()):
            yield f"  dense:  {count} calls, because of {reason}"
        for reason, count in sorted(self.others.items()):
            yield f"  dense:  {count} other calls, {reason}"
