"""What the last run did: figures, and a table of them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .state import RankRecord, TransformerState
from .watch import ALL_KEPT, Watch, is_replaced, lost_layers, nothing_saved, shortened, uncalled_layers


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
    rank_densities   where processes share the forwards: density of each rank's heads; all other figures are of all of
                     them together, on every rank
    imbalance        by how much of the mean rank's pairs the rank that has most in a call exceeds it, mean over calls:
                     0.05 where the others wait for 5% more; 0 without such ranks
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
    rank_densities: tuple[float, ...] = ()
    imbalance: float = 0.0


def run_stats(states: Sequence[TransformerState]) -> RunStats:
    """Figures of the last run. Waits for the device."""
    layers, reasons, backends = [], Counter[str](), set[str]()
    density_sum, steps, forwards, skipped = 0.0, 0, 0, 0
    for state in states:
        with state.lock:
            state.catch_up()
            steps += len(state.steps_seen)
            forwards += state.count
            skipped += state.skipped
            for layer in state.layers:
                record = layer.record
                total = float(record.density)
                density_sum += total
                reasons.update(record.dense)
                backends |= record.backends
                layers.append(
                    LayerStats(
                        transformer=state.name,
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
        **_by_rank([state.ranks for state in states if state.ranks.densities is not None]),
    )


def _by_rank(records: Sequence[RankRecord]) -> dict[str, Any]:
    if not records:
        return {}
    calls = sum(record.calls for record in records)
    sums = torch.stack([record.densities.double().cpu() for record in records if record.densities is not None])
    more = sum(record.imbalance() * record.calls for record in records) / calls
    return {"rank_densities": tuple((sums.sum(0) / calls).tolist()), "imbalance": more}


def run_summary(states: Sequence[TransformerState], watch: Watch) -> str:
    """A table of what ran sparse, how densely and where, of what ran dense and why, and of what is no longer true."""
    run = run_stats(states)
    lines = [f"Rectified SpaAttn, {'enabled' if any(state.active for state in states) else 'disabled'}"]
    lines += [_settings(state) for state in states]
    lines += [
        f"  REPLACED: {state.name} of the pipeline is another object now and runs full attention; the figures are of "
        "the one that was enabled (disable and enable again)"
        for state in states
        if is_replaced(state, watch.pipeline)
    ]
    if run.forwards == 0 and not run.dense_calls:
        return "\n".join([*lines, "  nothing has run yet"])
    steps = f"{run.steps} steps, " if run.steps else ""
    calls = run.sparse_calls + run.dense_calls
    skipped = f" ({run.skipped} skipped by a cache)" if run.skipped else ""
    lines.append(f"  last run: {steps}{run.forwards} forwards{skipped}, {calls} attention calls")
    if run.sparse_calls:
        lines.append(f"  sparse: {run.sparse_calls} calls, density {run.density:.1%}, backend {run.backend}")
    else:
        lines.append("  sparse: none")
    if run.rank_densities:
        low, high = min(run.rank_densities), max(run.rank_densities)
        lines.append(
            f"  {len(run.rank_densities)} ranks: densities {low:.1%} to {high:.1%}; in a call the rank with most pairs "
            f"has {run.imbalance:.1%} more than the mean"
            + (", heads dealt out by what they computed" if any(state.balanced for state in states) else "")
        )
    if run.density >= ALL_KEPT and states[0].config.sparsity:
        lines.append(f"  NOTHING SAVED: {nothing_saved(states[0])}")
    lines += [f"  dense:  {count} calls, because of {reason}" for reason, count in sorted(run.dense_reasons.items())]
    if calls:
        lines.append(f"  computed attention pairs: {run.overall_density:.1%} of full attention in these layers")
    for state in states:
        lost = lost_layers(state) if state.active else []
        if lost:
            lines.append(f"  LOST on {state.name}: {shortened(lost)} (replaced; disable and enable again)")
        uncalled = uncalled_layers(state) if state.completed else []
        if uncalled:
            lines.append(
                f"  NOT CALLED on {state.name}: {shortened(uncalled)} (skipped, or not through the dispatcher)"
            )
    return "\n".join(lines)


def _settings(state: TransformerState) -> str:
    config = state.config
    return (
        f"  {state.name} ({state.kind}): {len(state.layers)} layers, sparsity {config.sparsity:g}, "
        f"top_p {config.top_p:g}, rectify {config.rectify}, block {config.block_size}, order {config.order}"
    )
