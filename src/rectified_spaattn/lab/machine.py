"""The machine that something was measured on: its device, what is installed, the commit of the code."""

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:  # options are read and help is shown without it
    import torch

DEVICES = ("auto", "cpu", "cuda")
_PACKAGES = ("flash-attn-4", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What every CSV row says about its making; empty where something is not installed or not known.

    device   what the device calls itself
    commit   of the checkout that the code ran from, with "-dirty" behind it where files were changed
    command  what was typed; created: ISO 8601, UTC
    """

    device: str
    torch: str
    triton: str
    flash_attn_4: str
    commit: str
    command: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """As every JSON file of this package holds it.

    created   ISO 8601, UTC; commit: as in Origin
    versions  "python" and packages -> version, None where one is not installed
    device    type: "cpu" or "cuda"; name: what it calls itself; system: such as "Linux x86_64"; threads: that torch
              uses on the CPU; load_average: see there; cuda: CUDA or ROCm version that torch was built with, None for a
              CPU build; driver: of NVIDIA, None where its tool is missing or finds no GPU; compute_capability and
              memory_bytes: of the GPU, None without one
    """

    created: str
    commit: str
    versions: dict[str, str | None]
    device: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def origin(self, command: str) -> Origin:
        return Origin(
            device=self.device["name"],
            torch=self.versions["torch"] or "",
            triton=self.versions["triton"] or "",
            flash_attn_4=self.versions["flash-attn-4"] or "",
            commit=self.commit,
            command=command,
            created=self.created,
        )


def machine(device: "torch.device") -> Machine:
    """This machine as it is now."""
    import torch

    from ..backends.calls import installed_version, triton_version

    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(Path(__file__)),
        versions={
            "rectified-spaattn": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": triton_version(),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        device={
            "type": device.type,
            "name": device_name(device),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "load_average": load_average(),
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
            "compute_capability": None if gpu is None else f"{gpu.major}.{gpu.minor}",
            "memory_bytes": None if gpu is None else gpu.total_memory,
        },
    )


def check_device(name: str) -> None:
    """Raises ValueError as `device_of` does; asks torch only where a GPU was named."""
    if name not in ("auto", "cpu"):
        device_of(name)


def device_of(name: str, process: int | None = None) -> "torch.device":
    """The device behind "auto", "cpu" or "cuda"; "auto" is a GPU where there is one.

    process: number of this process among those on the machine. GPUs are dealt out in turn, and the one of this process
    becomes torch's current one. None: the current one. Raises ValueError for another name, or where there is no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"device: got {name!r}; allowed: auto, cpu or cuda.")
    import torch

    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError(
            "device: got 'cuda', but torch finds no CUDA GPU here. Use cpu, or install a CUDA build of torch."
        )
    if name == "cpu" or not gpu:
        return torch.device("cpu")
    if process is not None:
        torch.cuda.set_device(process % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: "torch.device") -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None on systems that do not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip() or None


def _commit(file: Path) -> str:
    """The commit of the checkout that `file` is tracked in, "" where it is not."""
    git = ("git", "-C", str(file.parent))
    if not _output(*git, "ls-files", "--error-unmatch", file.name):
        return ""  # installed, not checked out
    return _output(*git, "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40")


def _output(tool: str, *arguments: str) -> str:
    """What a tool prints, "" where it is not installed, fails or hangs."""
    if shutil.which(tool) is None:
        return ""
    try:
        process = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:  # a driver that hangs: what was measured is written all the same
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
