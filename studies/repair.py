"""Whether probe rows, which are exact, can tell how to correct all other rows of a head.

    OMP_NUM_THREADS=1 python -m studies.repair --pairs 2 --step 3 --step 6 --step 9

Of every head what the sparse output lacks is fitted on its probe rows, as a linear function of some features of a row,
and added to every tiled row. The ridge is the one of RIDGES with the least leave-one-out error on the probe rows, or no
correction where that is less. `error` is that of single attention calls that full attention led to, `best` the same
with the ridge that would have been best for each head, which nobody can know. "none, a block more" spends the pairs of
the probe rows on more kept blocks instead.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rectified_spaattn.config import RECTIFY, SparseConfig
from rectified_spaattn.lab.calls.capture import AttentionCall
from rectified_spaattn.lab.calls.error import full_attention
from rectified_spaattn.lab.option import option
from rectified_spaattn.method.probe import probe_places

from . import harness

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # over the mean square of the features


def _ones(x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(len(x), 1)


# features of rows, [rows, features], from sparse outputs and queries [rows, D]
FEATURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one vector": lambda out, q: _ones(out),
    "a matrix times the output": lambda out, q: torch.cat([_ones(out), out], 1),
    "a matrix times the query": lambda out, q: torch.cat([_ones(q), q], 1),
    "both": lambda out, q: torch.cat([_ones(q), out, q], 1),
}
BLOCK_MORE = "none, a block more"
REPAIRS = ("none", BLOCK_MORE, "one factor", *FEATURES)


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    kept: tuple[int, ...] = option("Kept blocks, the mean of all rows.", (6,))
    rows: int = option("Probe rows a head.", 64)
    mode: tuple[str, ...] = option("Modes.", ("none", "row", "query+slope"), choices=tuple(RECTIFY))
    block_size: int = option("Tokens a block.", harness.EXACT.block_size)


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    """Means over the calls of one pair."""

    KEYS: ClassVar[tuple[str, ...]] = ("mode", "kept", "repair")
    mode: str
    kept: int
    repair: str
    error: float
    best: float


def corrections(
    features: torch.Tensor, probed: torch.Tensor, lacking: torch.Tensor
) -> list[tuple[float, torch.Tensor]]:
    """(leave-one-out square error on the probe rows, correction [rows, D]) of every ridge, and of no correction.

    features: [rows, F] of all rows; probed: int64 [R]; lacking: [R, D], what these lack.
    """
    seen = features[probed]
    square = seen.T @ seen
    found = [(lacking.square().sum().item(), lacking.new_zeros(len(features), lacking.shape[1]))]
    for ridge in RIDGES:
        weight = ridge * seen.square().mean() * len(seen)
        solved = torch.linalg.solve(square + weight * torch.eye(len(square)), seen.T)  # [F, R]
        fitted, leverage = seen @ (solved @ lacking), (seen * solved.T).sum(1)
        left = ((lacking - fitted) / (1 - leverage).clamp(min=1e-6)[:, None]).square().sum().item()
        found.append((left, features @ (solved @ lacking)))
    return found


def repaired(
    repair: str, out: torch.Tensor, full: torch.Tensor, q: torch.Tensor, probed: torch.Tensor
) -> tuple[float, float]:
    """Square errors of one head: as chosen on the probe rows, and with the best ridge. out, full, q: [rows, D]."""
    lacking = (full - out)[probed]
    if repair == "one factor":
        factor = (out[probed] * full[probed]).sum() / out[probed].square().sum()
        tried = [(0.0, (factor - 1) * out)]
    else:
        tried = corrections(FEATURES[repair](out, q), probed, lacking)
    errors = [(left, (full - out - more).square().sum().item()) for left, more in tried]
    return min(errors)[1], min(error for _, error in errors)


def measured(calls: Sequence[AttentionCall], options: Options) -> Iterator[dict[str, Any]]:
    for call in calls:
        full = full_attention(call)[0]
        tiled = call.video
        for mode, kept in itertools.product(options.mode, options.kept):
            config = SparseConfig(rectify=mode, block_size=options.block_size, top_p=0.0)  # type: ignore[arg-type]
            nb = call.blocks(config).num_blocks
            outs = {}
            for name, count in (("", float(kept)), (BLOCK_MORE, kept + options.rows / options.block_size)):
                count = count if config.rule.choice == "error" else round(count)
                top_k = torch.full((1, full.shape[1]), float(min(count, nb)), device=full.device)
                outs[name] = call.sparse(config, top_k=top_k)
            out, stats = outs[""]
            assert stats.token_order is not None
            at = torch.searchsorted(tiled, probe_places(stats.token_order[0], options.rows))  # [H, R], among tiled ones
            got, exact, q = (x[tiled].transpose(0, 1) for x in (out[0], full, call.q[0]))  # [H, rows, D]
            for repair in REPAIRS:
                if repair in ("none", BLOCK_MORE):
                    chosen = outs["" if repair == "none" else BLOCK_MORE][0][0]
                    error = best = ((chosen - full)[tiled].norm() / exact.norm()).item()
                else:
                    heads = [repaired(repair, *each) for each in zip(got, exact, q, at, strict=True)]
                    error, best = (math.sqrt(sum(of)) / exact.norm().item() for of in zip(*heads, strict=True))
                yield {"mode": mode, "kept": kept, "repair": repair, "error": error, "best": best}


def repair(options: Options) -> None:
    """Probe rows as a lever to correct the other rows."""

    def show(rows):
        print(harness.table(rows, ("error", "best"), {"repair": "none"}, ("error",)))

    harness.run("repair", Row, options, harness.on_calls(Row, options, lambda calls: measured(calls, options)), show)


if __name__ == "__main__":
    harness.main(Options, repair)
