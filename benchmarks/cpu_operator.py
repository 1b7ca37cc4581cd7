"""Times the operator against PyTorch's dense attention on the same tensors, on a CPU.

    python benchmarks/cpu_operator.py [--csv FILE] [--threads 2] [--repeats 7] [--grid 16 24 24]

Before anything is timed the results are checked. Every round calls dense attention and each configuration in turn, so
that whatever slows the machine down slows all of them; the ratio is of medians. Dense attention is timed on the layout
that a model has ([B, S, H, D] viewed as [B, H, S, D]) and on contiguous [B, H, S, D]; the faster one is the baseline.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rectified_spaattn import SparseConfig, TokenLayout, rectified_attention
from rectified_spaattn.lab.machine import machine
from rectified_spaattn.lab.rows import write_rows

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HEADS, HEAD_DIM = 4, 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration on one input: seconds of a call, median and extremes; ratio of the medians, dense over ours."""

    input: str
    sparsity: float
    block_size: int
    selection: str
    density: float
    dense_s: float
    dense_min_s: float
    dense_max_s: float
    ours_s: float
    ours_min_s: float
    ours_max_s: float
    ratio: float
    dense_layout: str
    threads: int
    cpu: str


def gaussian(grid: tuple[int, int, int], heads: int = HEADS) -> Tensors:
    """Independent normal q, k, v [1, S, H, D]: attention is spread evenly, the hardest case to select from."""
    return tuple(torch.randn(1, grid[0] * grid[1] * grid[2], heads, HEAD_DIM) for _ in "qkv")  # type: ignore[return-value]


def smooth(grid: tuple[int, int, int], heads: int = HEADS) -> Tensors:
    """Fields that vary slowly over the grid, with some noise, and q near k: like a video model's attention."""

    def field() -> torch.Tensor:
        coarse = torch.randn(heads, HEAD_DIM, *(max(2, side // 6) for side in grid))
        fine = torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
        return fine.flatten(2).permute(2, 0, 1)[None] * 1.5

    k = field()
    q, v = k + 0.3 * field(), field()
    return q + 0.3 * torch.randn_like(q), k + 0.3 * torch.randn_like(k), (v + 0.3 * torch.randn_like(v)).contiguous()


PAPER = SparseConfig.paper()
# "exact" keeps the nominal share of blocks, "published" adds what top-p and the 3-D neighbours ask for, both in the
# paper's mode; "default" is exact, too, in the mode and order of this package
SELECTIONS: dict[str, dict[str, Any]] = {
    "exact": {"top_p": 0.0, "neighbours": False},
    "published": {"top_p": 0.3, "neighbours": True},
    "default": {"top_p": 0.0, "neighbours": False, "rectify": SparseConfig().rectify, "order": SparseConfig().order},
}
INPUTS: dict[str, Callable[..., Tensors]] = {"gaussian": gaussian, "smooth": smooth}


def check() -> None:
    """Sparsity 0 is dense attention; the sparse result is that of the float64 reference. Raises AssertionError."""
    grid = (4, 12, 12)
    for (name, make), block_size in product(INPUTS.items(), (64, 128)):
        q, k, v = make(grid, heads=1)
        layout, config = TokenLayout.build(grid), PAPER.replace(block_size=block_size)
        full = rectified_attention(q, k, v, layout, config.replace(sparsity=0))
        dense = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-5)
        options: dict[str, Any] = {"config": config.replace(neighbours=False), "return_stats": True}
        sparse, stats = rectified_attention(q, k, v, layout, **options)
        exact, exact_stats = rectified_attention(q, k, v, layout, **options, backend="reference")
        assert torch.equal(stats.compensated, exact_stats.compensated), f"{name}, {block_size}: other blocks"
        torch.testing.assert_close(sparse.double(), exact, rtol=1e-4, atol=1e-5)


def measure(calls: dict[Any, Callable[[], object]], repeats: int, progress: Progress) -> dict[Any, list[float]]:
    """Seconds of every call, `repeats` times in turns, after one round that is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in progress.track(range(repeats + 1), description="timing"):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(name: str, tensors: Tensors, grid: tuple[int, int, int], repeats: int, progress: Progress) -> list[Row]:
    views = tuple(x.transpose(1, 2) for x in tensors)
    contiguous = tuple(x.contiguous() for x in views)
    dense_calls = {"[B,S,H,D] view": lambda: sdpa(*views), "contiguous": lambda: sdpa(*contiguous)}
    ours = {}
    for sparsity, block_size, selection in product((0.8, 0.9), (64, 128), SELECTIONS):
        config = PAPER.replace(sparsity=sparsity, block_size=block_size, **SELECTIONS[selection])
        ours[sparsity, block_size, selection] = partial(rectified_attention, *tensors, TokenLayout.build(grid), config)
    seconds = measure({**dense_calls, **ours}, repeats, progress)
    dense_layout = min(dense_calls, key=lambda layout: median(seconds[layout]))
    dense = seconds[dense_layout]
    table = []
    for (sparsity, block_size, selection), call in ours.items():
        _, stats = call(return_stats=True)
        mine = seconds[sparsity, block_size, selection]
        row = Row(
            input=name,
            sparsity=sparsity,
            block_size=block_size,
            selection=selection,
            density=stats.density,
            dense_s=median(dense),
            dense_min_s=min(dense),
            dense_max_s=max(dense),
            ours_s=median(mine),
            ours_min_s=min(mine),
            ours_max_s=max(mine),
            ratio=median(dense) / median(mine),
            dense_layout=dense_layout,
            threads=torch.get_num_threads(),
            cpu=torch.backends.cpu.get_cpu_capability(),
        )
        table.append(row)
    return table


def show(r: Row) -> str:
    spread = f"{r.dense_s:6.3f} ({r.dense_min_s:.3f}-{r.dense_max_s:.3f})"
    ours = f"{r.ours_s:6.3f} ({r.ours_min_s:.3f}-{r.ours_max_s:.3f})"
    return (
        f"{r.input:9} {r.sparsity:8} {r.block_size:5} {r.selection:>10} {r.density:8.3f} "
        f"{spread:>22} {ours:>22} {r.ratio:6.2f}x  {r.dense_layout}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the table to this file too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="7 or more")
    parser.add_argument("--grid", type=int, nargs=3, default=(16, 24, 24), metavar=("T", "H", "W"))
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error(f"--repeats: got {arguments.repeats}; allowed: 7 or more, or the median says little.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    grid = tuple(arguments.grid)
    check()

    tokens = grid[0] * grid[1] * grid[2]
    print(f"grid {grid}, {tokens} tokens, {HEADS} heads of {HEAD_DIM}, float32, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, median of {arguments.repeats} (min-max) in seconds; results checked")
    print(f"{'input':9} sparsity block  selection  density {'dense':>22} {'ours':>22}   ratio  dense layout")
    table: list[Row] = []
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress, torch.inference_mode():
        for name, make in INPUTS.items():
            some = rows(name, make(grid), grid, arguments.repeats, progress)
            table += some
            for row in some:
                progress.console.print(show(row), markup=False, highlight=False, soft_wrap=True)
    if arguments.csv:
        command = shlex.join(["python", *sys.argv])
        write_rows(arguments.csv, table, machine(torch.device("cpu")).origin(command))
        print(f"wrote {arguments.csv}")


if __name__ == "__main__":
    main()
