"""`bench model` in the processes that torchrun started: every forward is shared between them, by Ulysses."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

K = TypeVar("K")


def join(device: str) -> tuple[int, int]:
    """Rank and number of the processes; (0, 1) for one alone. device: "auto", "cuda" or "cpu"."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available() and device != "cpu"
        dist.init_process_group("nccl" if gpu else "gloo")
    return rank, count


def process_on_machine() -> int | None:
    """The number of this process among those on the machine, None for one alone."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() and "LOCAL_RANK" in os.environ else None


def cut(transformer: Any) -> None:
    """Share its forwards between the processes; where there is one, leave it."""
    if dist.is_initialized():
        from ...pipelines import parallelize

        parallelize(transformer)


def slowest(seconds: Mapping[K, list[float]], device: torch.device) -> dict[K, list[float]]:
    """Of every forward and round the time of the process that took longest, in every process."""
    if not dist.is_initialized():
        return dict(seconds)
    times = torch.tensor(list(seconds.values()), dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return dict(zip(seconds, times.tolist(), strict=True))
