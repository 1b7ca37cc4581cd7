"""What this machine has, what every backend would do on it, and whether those that run are right."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .backends import AUTO_ORDER, BACKENDS, Call
from .backends.call import KERNEL_BLOCK_SIZES, KERNEL_HEAD_DIMS, installed_version, triton_version
from .benchmark.check import BenchError, check_small
from .benchmark.shapes import Case, Shape
from .lab.machine import device_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKAGES = ("rectified-spaattn", "torch", "triton", "flash-attn-4", "diffusers", "transformers", "accelerate")

# Some blocks of either size, and 16 tokens that fill none; text behind the video.
_CHECKED = Shape(name="self-check", grid=(5, 13, 16), text=10, text_first=False, heads=2, head_dim=128)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """versions: package -> version, None where it is not installed. memory: of the GPU in bytes, None without one."""

    python: str
    system: str
    versions: dict[str, str | None]
    device: str
    compute_capability: str | None
    memory: int | None
    driver: str | None
    cuda: str | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One call. why_not: backend -> the reason why it cannot run, None where it can. auto: what "auto" takes."""

    call: Call
    why_not: dict[str, str | None]
    auto: str | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One backend on small inputs. error, allowed: relative to the largest exact value; wrong: what was, else ""."""

    backend: str
    call: Call
    error: float | None
    allowed: float | None
    wrong: str


def facts(device: torch.device) -> Facts:
    gpu = device.type == "cuda"
    found = {name: installed_version(name) for name in PACKAGES}
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={**found, "torch": str(torch.__version__), "triton": triton_version()},
        device=device_name(device),
        compute_capability="{}.{}".format(*torch.cuda.get_device_capability(device)) if gpu else None,
        memory=torch.cuda.get_device_properties(device).total_memory if gpu else None,
        driver=_driver(),
        cuda=torch.version.cuda or torch.version.hip,
    )


def _driver() -> str | None:
    """Version of the NVIDIA driver, None where its tool is not there or finds no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def typical_calls(device: torch.device) -> list[Call]:
    """Every dtype with the head dims and block sizes of the supported models."""
    return [
        Call(device, dtype, head_dim, block_size)
        for dtype in DTYPES
        for head_dim in KERNEL_HEAD_DIMS
        for block_size in KERNEL_BLOCK_SIZES
    ]


def verdict(call: Call) -> Verdict:
    why_not = {name: backend.why_not(call) for name, backend in BACKENDS.items()}
    order = AUTO_ORDER.get(call.device.type, ("torch",))
    return Verdict(call=call, why_not=why_not, auto=next((name for name in order if why_not[name] is None), None))


def calls_to_check(verdicts: Sequence[Verdict]) -> list[tuple[str, Call]]:
    """For every backend and dtype, the last of the calls that it can run."""
    chosen: dict[tuple[str, torch.dtype], Call] = {}
    for name in BACKENDS:
        for each in verdicts:
            if each.why_not[name] is None:
                chosen[name, each.call.dtype] = each.call
    return [(name, call) for (name, _), call in chosen.items()]


def check(name: str, call: Call) -> Check:
    """The backend with every block kept against dense float64 attention, and at 80% against the reference.

    A backend that raises is reported as wrong: that it says it can run a call and then cannot is what to find here.
    """
    case = Case(replace(_CHECKED, head_dim=call.head_dim), call.block_size, call.dtype, call.device)
    try:
        results = check_small(case, name)
    except BenchError as error:
        return Check(backend=name, call=call, error=None, allowed=None, wrong=str(error))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        return Check(backend=name, call=call, error=None, allowed=None, wrong=told)
    worst = max(results, key=lambda each: each.error / each.allowed)
    return Check(backend=name, call=call, error=worst.error, allowed=worst.allowed, wrong="")


def check_all(
    chosen: Sequence[tuple[str, Call]], watch: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[Check]:
    """`check` for each, telling `watch` what comes next, how many are done and how many there are."""
    results = []
    for done, (name, call) in enumerate(chosen):
        watch(f"checking {name}, {str(call.dtype).removeprefix('torch.')}", done, len(chosen))
        results.append(check(name, call))
    return results


def healthy(checks: Sequence[Check]) -> bool:
    """At least one backend was checked, and none is wrong."""
    return bool(checks) and not any(each.wrong for each in checks)
