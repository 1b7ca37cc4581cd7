"""What the last run did: figures, and a table of them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ..attention import percentiles
from .balance import RankRecord
from .record import Record, devices_of, seconds_of
from .state import TransformerState
from .watch import ALL_KEPT, Watch, is_replaced, lost_layers, nothing_saved, saves, shortened, uncalled_layers


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Calls of one layer in the last run. density: mean over its sparse calls, NaN without any.

    error, error_p99  median and 99th percentile of what probe rows measured, |out - full| / |full| of a head, over its
                      heads and last 1,000 sparse calls; NaN without probe rows
    """

    transformer: str
    layer: int
    name: str
    sparse_calls: int
    dense_calls: int
    density: float
    error: float = math.nan
    error_p99: float = math.nan


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
    devices          names of what attention ran on
    seconds          from the beginning of the first forward to the end of the last, by the clock of the host: what a
                     GPU has still to do then is not waited for; NaN where no forward came to its end
    rank_densities   where processes share the forwards: density of each rank's heads; all other figures are of all of
                     them together, on every rank
    imbalance        by how much of the mean rank's pairs the rank that has most in a call exceeds it, mean over calls:
                     0.05 where the others wait for 5% more; 0 without such ranks
    error, error_p99 as of a layer, over all of them
    probed           how many heads of calls these are of
    unheld           those of them that kept as many blocks as max_density allows, and were above the tolerance still
    plan_bytes       memory that plans kept for later steps hold now, and the most they held in the run; on each rank
    plan_bytes_peak  its own
    precisions       sparse calls by the precision of their products with kept blocks; on each rank its own
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
    error: float = math.nan
    error_p99: float = math.nan
    probed: int = 0
    unheld: int = 0
    plan_bytes: int = 0
    plan_bytes_peak: int = 0
    precisions: dict[str, int] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    seconds: float = math.nan


def run_stats(states: Sequence[TransformerState]) -> RunStats:
    """Figures of the last run. Waits for the device."""
    layers, reasons, backends = [], Counter[str](), set[str]()
    density_sum, steps, forwards, skipped, unheld = 0.0, 0, 0, 0, 0
    probed = []
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
                errors, full = _probed(record)
                probed.append(errors)
                if state.config.tolerance is not None:
                    unheld += int((full & (errors > state.config.tolerance)).sum())
                error, error_p99 = percentiles(errors)
                layers.append(
                    LayerStats(
                        transformer=state.name,
                        layer=layer.index,
                        name=layer.name,
                        sparse_calls=record.sparse,
                        dense_calls=record.dense.total(),
                        density=total / record.sparse if record.sparse else math.nan,
                        error=error,
                        error_p99=error_p99,
                    )
                )
    sparse, dense = sum(layer.sparse_calls for layer in layers), reasons.total()
    every = torch.cat(probed) if probed else torch.zeros(0)
    error, error_p99 = percentiles(every)
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
        error=error,
        error_p99=error_p99,
        probed=len(every),
        unheld=unheld,
        plan_bytes=sum(state.plans.nbytes for state in states),
        plan_bytes_peak=sum(state.plans.peak for state in states),
        precisions=dict(sum((state.precisions.calls for state in states), Counter())),
        devices=devices_of([state.span for state in states]),
        seconds=seconds_of([state.span for state in states]),
    )


def _probed(record: Record) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all calls and heads that were probed, what `Record.probes` holds, [n] each, on the CPU."""
    if not record.probes:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    errors, full = (torch.cat([x.flatten() for x in of]).cpu() for of in zip(*record.probes, strict=True))
    return errors, full


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
    lines = [f"Rectified SpaAttn, {enabled_word(states)}", *map(settings_line, states)]
    lines += [
        f"  REPLACED: {state.name} of the pipeline is another object now and runs full attention; the figures are of "
        "the one that was enabled (disable and enable again)"
        for state in states
        if is_replaced(state, watch.pipeline)
    ]
    if run.forwards == 0 and not run.dense_calls:
        return "\n".join([*lines, "  nothing has run yet"])
    calls = run.sparse_calls + run.dense_calls
    lines.append(f"  last run: {calls_line(run)}")
    if not math.isnan(run.seconds):
        lines.append(f"  took {run.seconds:.1f} s from the first forward to the end of the last, on {_places(run)}")
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
    if run.density >= ALL_KEPT and saves(states[0].config):
        lines.append(f"  NOTHING SAVED: {nothing_saved(states[0])}")
    lines += [f"  dense:  {count} calls, because of {reason}" for reason, count in sorted(run.dense_reasons.items())]
    if calls:
        lines.append(f"  computed attention pairs: {run.overall_density:.1%} of full attention in these layers")
    for state in states:
        of = f" of {state.name}" if len(states) > 1 else ""
        lines += [*state.plans.lines(state.config, of), *state.precisions.lines(state.config, of)]
    lines += _measured(run, states)
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


def _measured(run: RunStats, states: Sequence[TransformerState]) -> list[str]:
    """What probe rows measured, and what a tolerance made of it."""
    layers = [layer for layer in run.layers if layer.sparse_calls]
    if not run.probed:
        return []
    lines = []
    if any(state.config.tolerance is not None for state in states):
        densities = [layer.density for layer in layers]
        lines.append(
            f"  density of a layer under the tolerance: median {median(densities):.1%}, {min(densities):.1%} to "
            f"{max(densities):.1%}; {run.unheld} of {run.probed} heads of calls kept all that max_density allows and "
            "were above the tolerance still"
        )
    lines.append(f"  measured error of a head: median {run.error:.3f}, 99th percentile {run.error_p99:.3f}; by layer")
    lines += [
        f"    {layer.name}: {layer.error:.3f}, {layer.error_p99:.3f}, density {layer.density:.1%}" for layer in layers
    ]
    return lines


def calls_line(run: RunStats) -> str:
    """How much ran, in a line."""
    steps = f"{run.steps} steps, " if run.steps else ""
    skipped = f" ({run.skipped} skipped by a cache)" if run.skipped else ""
    return f"{steps}{run.forwards} forwards{skipped}, {run.sparse_calls + run.dense_calls} attention calls"


def _places(run: RunStats) -> str:
    return ", ".join(run.devices) or "a device that no attention call told"


def enabled_word(states: Sequence[TransformerState]) -> str:
    return "enabled" if any(state.active for state in states) else "disabled"


def settings_line(state: TransformerState) -> str:
    """One transformer and how it is set."""
    config = state.config
    wanted = f"sparsity {config.sparsity:g}"
    if config.tolerance is not None:
        wanted = f"tolerance {config.tolerance:g} from {wanted} on, max_density {config.max_density:g}"
    return f"  {state.name} ({state.kind}): {len(state.layers)} layers,\n    {wanted}, {config.description}"
