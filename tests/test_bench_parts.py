"""The parts of the operator benchmark: shapes, baselines, timing. GPUs are played by fakes."""

import statistics
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from rectified_spaattn import SparseConfig
from rectified_spaattn.lab.bench import baselines, timing
from rectified_spaattn.lab.bench.baselines import BASELINES
from rectified_spaattn.lab.bench.shapes import MODEL_SHAPES, SHAPES, Case
from rectified_spaattn.lab.bench.timing import Timed, interleaved, sets_for, summary

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "video", "text", "text_first", "heads", "head_dim"),
    [
        ("hunyuan-video", 115_200, 256, False, 24, 128),
        ("wan-14b", 75_600, 0, False, 40, 128),
        ("wan-1.3b-480p", 32_760, 0, False, 12, 128),
        ("cogvideox1.5", 44_880, 226, True, 48, 64),
        ("flux-4096", 65_536, 512, True, 24, 128),
        ("tiny", 256, 10, False, 2, 64),
    ],
)
def test_shapes_are_those_of_the_models(
    name: str, video: int, text: int, text_first: bool, heads: int, head_dim: int
) -> None:
    shape = SHAPES[name]
    assert (shape.video, shape.text, shape.text_first) == (video, text, text_first)
    assert (shape.heads, shape.head_dim, shape.tokens) == (heads, head_dim, video + text)
    small = shape.small()
    assert small.video <= 4096
    assert (small.text, small.head_dim, small.heads) == (text, head_dim, 2)
    if name != "tiny":
        assert small.video > 1500
        assert small.video % 128  # isolated video tokens are checked, too
        assert name in MODEL_SHAPES


def test_calls_are_interleaved_on_rotating_inputs_and_the_warm_up_does_not_count() -> None:
    seen: list[tuple[str, int]] = []
    rounds: list[tuple[int, int]] = []
    calls = {
        name: Timed(lambda i, name=name: seen.append((name, i)), repeats)  # type: ignore[misc]
        for name, repeats in (("a", 5), ("b", 3), ("c", 5))
    }
    times = interleaved(calls, 3, CPU, lambda finished, total: rounds.append((finished, total)))
    names = [name for name, _ in seen]
    rounds_of_three = [names[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds_of_three)
    assert len(set(map(tuple, rounds_of_three))) > 1  # not always the same call after the same one
    assert sorted(names[15:17]) == sorted(names[17:]) == ["a", "c"]
    assert all(before[1] != after[1] for before, after in pairwise(seen))
    assert len(seen) == 19
    assert {name: timing.repeats for name, timing in times.items()} == {"a": 5, "b": 3, "c": 5}
    assert rounds == [(number, 7) for number in range(1, 8)]


def test_summary_and_number_of_input_sets() -> None:
    seconds = [0.004, 0.001, 0.003, 0.002, 0.010]
    timing = summary(seconds)
    assert timing.median == pytest.approx(1000 * statistics.median(seconds))
    assert timing == pytest.approx((3, 2, 4, 1, 10, 5))
    gib = 2**30
    assert sets_for(2 * gib, cache_bytes=50 << 20, free_bytes=100 * gib) == 3
    assert sets_for(10 << 20, cache_bytes=50 << 20, free_bytes=100 * gib) == 16  # 20 asked for
    assert sets_for(25 << 20, cache_bytes=50 << 20, free_bytes=100 * gib) == 8
    assert sets_for(4 * gib, cache_bytes=50 << 20, free_bytes=20 * gib) == 2
    assert sets_for(40 * gib, cache_bytes=50 << 20, free_bytes=50 * gib) == 1


def test_cuda_events_enclose_each_call_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.place = -1

        def record(self) -> None:
            self.place = len(log)
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = {"a": lambda: log.append("a"), "b": lambda: log.extend("bb")}
    scratch = torch.ones(3, dtype=torch.uint8)
    clocks = {name: timing._cuda_clock(scratch, call) for name, call in calls.items()}
    assert log == ["event", "a", "event", "event", "b", "b", "event"]  # all is queued before anything is waited for
    assert not scratch.any()
    assert {name: seconds() for name, seconds in clocks.items()} == {"a": 2.0, "b": 3.0}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: bool, cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(baselines, "find_spec", lambda name: object() if installed else None)


@pytest.mark.parametrize(
    ("capability", "installed", "cuda", "dtype", "reasons"),
    [
        ((9, 0), True, "13.0", torch.bfloat16, {}),
        ((9, 0), False, "13.0", torch.float16, {"fa4": "not installed"}),
        ((8, 0), True, "13.0", torch.bfloat16, {"fa4": "capability 9.0 or higher, this GPU has 8.0"}),
        ((7, 5), True, "13.0", torch.float16, dict.fromkeys(("cudnn", "flash2", "fa4"), "this GPU has 7.5")),
        ((9, 0), True, "13.0", torch.float32, dict.fromkeys(("cudnn", "flash2", "fa4"), "float16 and bfloat16 only")),
        ((9, 4), True, None, torch.bfloat16, {"cudnn": "no cuDNN", "fa4": "NVIDIA"}),
    ],
)
def test_baselines_say_why_a_gpu_cannot_run_them(
    capability: tuple[int, int],
    installed: bool,
    cuda: str | None,
    dtype: torch.dtype,
    reasons: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch, capability, installed, cuda)
    case = Case(SHAPES["hunyuan-video"], SparseConfig(), dtype, torch.device("cuda", 0))
    got = {name: baseline.why_not(case) for name, baseline in BASELINES.items()}
    assert {name for name, reason in got.items() if reason} == set(reasons)
    for name, part in reasons.items():
        assert part in (got[name] or "")


@pytest.mark.parametrize("with_lse", [True, False])
def test_flash_attention_4_may_return_the_log_sum_exp_too(with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cute = ModuleType("flash_attn.cute")
    cute.flash_attn_func = lambda q, k, v: (q + v, k) if with_lse else q + v  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    x = torch.ones(1, 3, 2, 4)
    assert torch.equal(BASELINES["fa4"].run(x, x, x), 2 * x)
