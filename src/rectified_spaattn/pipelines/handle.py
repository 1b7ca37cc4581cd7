"""Handle: what enable gives back. It counts, reports and undoes."""

import math
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import SparseConfig
from .processor import is_wrapped
from .state import RunClock, TransformerState
from .watch import lost_layers, shortened, uncalled_layers


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Calls of one layer in the last run. density: mean over its sparse calls, NaN without any."""

    transformer: str
    layer: int
    name: str
    sparse_calls: int
    dense_calls: int
    density: float


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What the last run of the pipeline did.

    density          mean over the sparse calls (1 would be full attention), NaN without any
    overall_density  mean over all calls, dense ones counted as 1
    dense_reasons    calls that ran dense, by reason
    backend          names of what ran the sparse calls, comma-separated
    steps            denoising steps seen, 0 where nobody told them
    forwards         calls of the transformers
    skipped          those in which a cache left out every block, so no attention ran
    """

    sparse_calls: int
    dense_calls: int
    density: float
    overall_density: float
    dense_reasons: dict[str, int]
    backend: str
    steps: int
    forwards: int
    skipped: int
    layers: tuple[LayerStats, ...]


@dataclass(kw_only=True)
class Enabled:
    """One transformer with its hook, and its attention modules with the processors they had."""

    name: str
    model: nn.Module
    state: TransformerState
    hook: RemovableHandle
    originals: list[tuple[Any, Any]]


class Handle:
    """Rectified attention enabled on a pipeline or a transformer. Also a context manager that disables on exit."""

    def __init__(self, enabled: list[Enabled], clock: RunClock) -> None:
        self._enabled = enabled
        self._clock = clock
        self.active = True

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def disable(self) -> None:
        """Put the model back as it was; processors that somebody replaced since stay. Safe to call twice."""
        if not self.active:
            return
        self.active = False
        for item in self._enabled:
            item.hook.remove()
            for layer, (module, original) in zip(item.state.layers, item.originals, strict=True):
                if is_wrapped(module.processor, layer):
                    module.set_processor(original)

    def set_step(self, step: int, total: int | None = None) -> None:
        """Say which denoising step comes next, where no pipeline's scheduler tells. step: 0 .. total - 1."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step: got {step!r}; allowed: an integer of 0 or more.")
        if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total <= step):
            raise ValueError(f"total: got {total!r}; allowed: an integer above step = {step}, or None.")
        self._clock.tell(step, total)

    def configs(self) -> dict[str, SparseConfig]:
        """Transformer -> the config it runs with."""
        return {item.name: item.state.config for item in self._enabled}

    def stats(self) -> RunStats:
        """Figures of the last run. Waits for the device."""
        layers, reasons, backends = [], Counter[str](), set[str]()
        density_sum, steps, forwards, skipped = 0.0, 0, 0, 0
        for item in self._enabled:
            item.state.catch_up()
            steps += len(item.state.steps_seen)
            forwards += item.state.forwards
            calls = [layer.record.sparse + layer.record.dense.total() for layer in item.state.layers]
            if not lost_layers(item.model, item.state, item.originals):
                skipped += item.state.forwards - max(calls)  # every forward calls a layer once, or a cache left it out
            for layer in item.state.layers:
                record = layer.record
                total = float(record.density)
                density_sum += total
                reasons.update(record.dense)
                backends |= record.backends
                layers.append(
                    LayerStats(
                        transformer=item.name,
                        layer=layer.index,
                        name=layer.name,
                        sparse_calls=record.sparse,
                        dense_calls=record.dense.total(),
                        density=total / record.sparse if record.sparse else math.nan,
                    )
                )
        sparse, dense = sum(layer.sparse_calls for layer in layers), reasons.total()
        return RunStats(
            sparse_calls=sparse,
            dense_calls=dense,
            density=density_sum / sparse if sparse else math.nan,
            overall_density=(density_sum + dense) / (sparse + dense) if sparse + dense else math.nan,
            dense_reasons=dict(reasons),
            backend=", ".join(sorted(backends)),
            steps=steps,
            forwards=forwards,
            skipped=skipped,
            layers=tuple(layers),
        )

    def summary(self) -> str:
        """A table of what ran sparse, how densely and where, and of what ran dense and why."""
        run = self.stats()
        lines = [f"Rectified SpaAttn, {'enabled' if self.active else 'disabled'}"]
        for item in self._enabled:
            config = item.state.config
            lines.append(
                f"  {item.name} ({type(item.model).__name__}): {len(item.state.layers)} layers, "
                f"sparsity {config.sparsity:g}, top_p {config.top_p:g}, rectify {config.rectify}, "
                f"block {config.block_size}, order {config.order}"
            )
        if run.forwards == 0:
            return "\n".join([*lines, "  nothing has run yet"])
        steps = f"{run.steps} steps, " if run.steps else ""
        calls = run.sparse_calls + run.dense_calls
        skipped = f" ({run.skipped} skipped by a cache)" if run.skipped else ""
        lines.append(f"  last run: {steps}{run.forwards} forwards{skipped}, {calls} attention calls")
        if run.sparse_calls:
            lines.append(f"  sparse: {run.sparse_calls} calls, density {run.density:.1%}, backend {run.backend}")
        else:
            lines.append("  sparse: none")
        lines += [
            f"  dense:  {count} calls, because of {reason}" for reason, count in sorted(run.dense_reasons.items())
        ]
        if calls:
            lines.append(f"  computed attention pairs: {run.overall_density:.1%} of full attention in these layers")
        for item in self._enabled:
            lost = lost_layers(item.model, item.state, item.originals) if self.active else []
            if lost:
                lines.append(f"  LOST on {item.name}: {shortened(lost)} (replaced; disable and enable again)")
            uncalled = uncalled_layers(item.model, item.state, item.originals) if item.state.forwards else []
            if uncalled:
                lines.append(
                    f"  NOT CALLED on {item.name}: {shortened(uncalled)} (skipped, or not through the dispatcher)"
                )
        return "\n".join(lines)
