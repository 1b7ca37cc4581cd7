"""The controller of a tolerance on captured calls: how near it comes, with other gains and from other starts.

    OMP_NUM_THREADS=1 python -m studies.controller --pairs 1 --layer 0 --layer 2 --layer 4 --layer 5

What every head of every call gets wrong is measured at several numbers of kept blocks, over all its rows and over probe
rows; the controller in use then runs from step to step on what lies between them, with the probe rows' error, and is
judged by the true one. Calls are those that full attention led to, so errors of earlier steps change nothing.

`error` is the root mean square over calls of |out - full| / |full|, `median` and `p99` are of heads, all over the
tolerance and from the fifth step on. `kept` is blocks a row, `uniform` how many one number for all heads and steps
would need for the same `error`. `deviation` is that of the logarithm of what probe rows measure of a head, over the
true error.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch

from rectified_spaattn.config import RECTIFY, SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.lab.option import option
from rectified_spaattn.method import tolerance as controller

from . import harness

FROM = 4  # the first step that is judged


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    tolerance: tuple[float, ...] = option("Errors to hold.", (0.025, 0.05, 0.1))
    mode: tuple[str, ...] = option("Modes.", ("row", "query+slope"), choices=tuple(RECTIFY))
    gain: tuple[float, ...] = option("Gains after the first step.", (0.35, 0.5, 0.7, 1.0))
    start: tuple[float, ...] = option("Blocks a row to start from.", (3.0, 13.0, 32.0))
    kept: tuple[int, ...] = option("Blocks a row at which errors are measured.", (1, 2, 4, 6, 10, 18, 32))
    rows: int = option("Probe rows a head.", 64)
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """One run of the controller over the calls of one pair."""

    KEYS: ClassVar[tuple[str, ...]] = ("mode", "tolerance", "gain", "start")
    mode: str
    tolerance: float
    gain: float
    start: float
    kept: float
    uniform: float
    error: float
    median: float
    p99: float
    deviation: float


class Plant(NamedTuple):
    """Logarithms of norms of heads at several numbers of blocks, [steps, layers, H, K] each: |out - full| and |full|
    over all tiled rows, and over probe rows; and of the blocks, [K], rising.
    """

    wrong: torch.Tensor
    full: torch.Tensor
    probe_wrong: torch.Tensor
    probe_full: torch.Tensor
    blocks: torch.Tensor

    def at(self, step: int, top_k: torch.Tensor) -> list[torch.Tensor]:
        """The four norms at top_k [layers, H], on straight lines between logarithms."""
        x = top_k.log().clamp(self.blocks[0], self.blocks[-1])
        i = torch.searchsorted(self.blocks, x.contiguous()).clamp(1, len(self.blocks) - 1)
        share = (x - self.blocks[i - 1]) / (self.blocks[i] - self.blocks[i - 1])
        found = []
        for table in self[:4]:
            low, high = (table[step].gather(-1, j[..., None])[..., 0] for j in (i - 1, i))
            found.append(((1 - share) * low + share * high).exp())
        return found


def plant_of(calls: Sequence[AttentionCall], mode: str, options: Options) -> Plant:
    """calls: of every step and layer, step by step."""
    config = SparseConfig(rectify=mode, block_size=options.block_size, top_p=0.0, probes=options.rows)  # type: ignore[arg-type]
    steps, rows = len({call.step for call in calls}), []
    for call in calls:
        exact, order, of_call = full_attention(call), None, []
        for kept in options.kept:
            top_k = torch.full((1, exact.shape[2]), float(kept), device=exact.device)
            out, stats = call.sparse(config, top_k=top_k, token_order=order)
            order = stats.token_order
            assert stats.probe is not None
            norms = [x[0, call.video].norm(dim=(0, 2)) for x in (out - exact, exact)]
            of_call.append(torch.stack([*norms, stats.probe.wrong[0], stats.probe.full[0]]))  # [4, H]
        rows.append(torch.stack(of_call, -1))  # [4, H, K]
    tables = torch.stack(rows).clamp(min=1e-9).log().cpu().unflatten(0, (steps, -1))
    return Plant(*tables.unbind(2), torch.tensor(options.kept).log())


def simulated(plant: Plant, tolerance: float, start: float, whole: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Errors of heads and of calls from step FROM on, and blocks a row. whole: a row keeps a whole number of them."""
    highest = plant.blocks[-1].exp().item()
    top_k = torch.full(plant.wrong.shape[1:3], min(start, highest))
    heads, calls, blocks = [], [], []
    for step in range(len(plant.wrong)):
        kept = top_k.floor() if whole else top_k
        wrong, full, probe_wrong, probe_full = plant.at(step, kept)
        heads.append(wrong / full)
        calls.append(wrong.norm(dim=1) / full.norm(dim=1))
        blocks.append(kept)
        top_k = controller.next_top_k(
            top_k,
            kept,
            probe_wrong / probe_full,
            tolerance=tolerance,
            usual=top_k.mean(),
            highest=highest,
            first=step == 0,
        )
    return torch.stack(heads[FROM:]), torch.stack(calls[FROM:]), torch.stack(blocks[FROM:]).mean().item()


def uniform_for(plant: Plant, error: float) -> float:
    """Blocks a row that give all calls together this error, were they the same for all; NaN where none do."""
    wrong, full = (x[FROM:].exp().norm(dim=2) for x in plant[:2])  # [steps, layers, K]
    errors = (wrong / full).square().mean((0, 1)).sqrt().log().flip(0)  # rising
    at = math.log(error)
    if not errors[0] <= at <= errors[-1]:
        return math.nan
    i = int(torch.searchsorted(errors, at).clamp(1, len(errors) - 1))
    share, blocks = (at - errors[i - 1]) / (errors[i] - errors[i - 1]), plant.blocks.flip(0)
    return float(((1 - share) * blocks[i - 1] + share * blocks[i]).exp())


def measured(calls: Sequence[AttentionCall], options: Options) -> Iterator[dict[str, Any]]:
    for mode in options.mode:
        plant = plant_of(calls, mode, options)
        deviation = (plant.probe_wrong - plant.probe_full - plant.wrong + plant.full).std().item()
        for tolerance, gain, start in itertools.product(options.tolerance, options.gain, options.start):
            with patch.object(controller, "LATER", (gain, *controller.LATER[1:])):
                heads, of_calls, kept = simulated(plant, tolerance, start, RECTIFY[mode].choice == "mass")
            error = of_calls.square().mean().sqrt().item()
            yield {
                "mode": mode, "tolerance": tolerance, "gain": gain, "start": start, "kept": kept,
                "uniform": uniform_for(plant, error), "error": error / tolerance,
                "median": heads.median().item() / tolerance, "p99": heads.flatten().quantile(0.99).item() / tolerance,
                "deviation": deviation,
            }  # fmt: skip


def study_controller(options: Options) -> None:
    """The controller of a tolerance on captured calls."""

    def show(rows):
        print(harness.table(rows, ("kept", "uniform", "error", "median", "p99", "deviation")))

    judge = harness.on_calls(Row, options, lambda calls: measured(calls, options), range(options.steps))
    harness.run("controller", Row, options, judge, show)


if __name__ == "__main__":
    harness.main(Options, study_controller)
