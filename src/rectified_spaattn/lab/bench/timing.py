"""Interleaved timing: round by round, every call once, so that whatever slows the machine down slows all of them."""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

K = TypeVar("K", bound=Hashable)
WARM_UP = 2  # rounds that are not counted
_MOST_SETS = 16
_SCRATCH_BYTES, _SCRATCH_FILLS = 256 << 20, 8  # half a millisecond or more on today's GPUs


class Timed(NamedTuple):
    """call(i) runs once on input set i; repeats: how many rounds it takes part in, after the warm-up."""

    call: Callable[[int], object]
    repeats: int


class Timing(NamedTuple):
    """Milliseconds: the median, the quartiles and the extremes of `repeats` calls."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    repeats: int

    def columns(self) -> dict[str, Any]:
        """As rows have them."""
        names = ("ms", "ms_q1", "ms_q3", "ms_min", "ms_max", "repeats")
        return dict(zip(names, self, strict=True))


def summary(seconds: Sequence[float]) -> Timing:
    """Of two or more durations in seconds."""
    ms = [1000 * each for each in seconds]
    q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive")
    return Timing(median, q1, q3, min(ms), max(ms), len(ms))


def interleaved(
    calls: Mapping[K, Timed], sets: int, device: torch.device, on_round: Callable[[int, int], None]
) -> dict[K, Timing]:
    """Times all calls after a warm-up; see durations."""
    return {name: summary(seconds) for name, seconds in durations(calls, sets, device, on_round).items()}


def durations(
    calls: Mapping[K, Timed],
    sets: int,
    device: torch.device,
    on_round: Callable[[int, int], None],
    warm_up: int = WARM_UP,
) -> dict[K, list[float]]:
    """Seconds of every call in every round that counts.

    Every round has another (but reproducible) order: a call that follows a long one finds a hotter, slower GPU.
    Neighbouring calls get different ones of the `sets` input sets, so that none finds its inputs in the cache.
    on_round(finished, total) is told after every round.
    """
    clock: Clock = _cpu_clock
    if device.type == "cuda":
        clock = partial(_cuda_clock, torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device))
    most = max(timed.repeats for timed in calls.values())
    call_number, order = itertools.count(), random.Random(0)
    rounds: list[dict[K, Callable[[], float]]] = []
    for turn in range(-warm_up, most):
        due = [name for name in calls if turn < calls[name].repeats]
        order.shuffle(due)
        rounds.append({name: clock(partial(calls[name].call, next(call_number) % sets)) for name in due})
        if len(rounds) > 1:  # the round before; this one is queued already, so the GPU is never idle
            for seconds in rounds[-2].values():
                seconds()
        on_round(turn + warm_up + 1, most + warm_up)
    counted = rounds[warm_up:]
    return {name: [each[name]() for each in counted if name in each] for name in calls}


# runs (or queues) a call and gives a function that tells, or waits for, its seconds
Clock = Callable[[Callable[[], object]], Callable[[], float]]


def _cpu_clock(call: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _cuda_clock(scratch: torch.Tensor, call: Callable[[], object]) -> Callable[[], float]:
    """Queues a call with an event before and after it; reading the duration waits for the second one.

    Before the first event `scratch` is overwritten: that clears the cache, and keeps the GPU busy until the host has
    queued the call, even where the call before made the host wait.
    """
    for _ in range(_SCRATCH_FILLS):
        scratch.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return seconds


def input_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of q, k, v to rotate: three or more, together at least four times the L2 cache.

    Fewer where they would take more than 0.4 of the GPU's free memory.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for itself
    return sets_for(set_bytes, cache, free + unused)


def sets_for(set_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    wanted = min(_MOST_SETS, max(3, math.ceil(4 * cache_bytes / set_bytes)))
    return max(1, min(wanted, int(0.4 * free_bytes) // set_bytes))


def extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call takes at its peak, its output included; None where torch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
