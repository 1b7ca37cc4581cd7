"""metrics.json: everything measured in a run, with what is needed to repeat it, as plain JSON values."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .metrics import finite_or_none
from .paired import Mode, Settings
from .scores import MeanScore, Score, pairs_won


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device and how busy the machine is (load average of the last minute, None where unknown)."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "rectified-spaattn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": importlib.metadata.version("diffusers"),
        },
        "device": {
            "type": device.type,
            "name": device_name(device),
            "threads": torch.get_num_threads(),
            "load_average": load_average(),
        },
    }


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None on systems that do not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def modes_record(modes: Sequence[Mode]) -> list[dict[str, Any]]:
    """Names, labels and configs; a config of None is full attention."""
    return [
        {"name": mode.name, "label": mode.label, "config": mode.config.to_dict() if mode.config else None}
        for mode in modes
    ]


def scores_record(scores: Sequence[Score] | Sequence[MeanScore]) -> list[dict[str, Any]]:
    """One mapping a score. psnr null stands for infinity: a clip identical to the one with full attention."""
    return [{**dataclasses.asdict(each), "psnr": finite_or_none(each.psnr)} for each in scores]


def comparisons_record(
    modes: Sequence[Mode], means: Sequence[MeanScore], scores: Sequence[Score]
) -> list[dict[str, Any]]:
    """Rectified against not rectified at every sparsity.

    psnr_gain: difference of the mean PSNRs in dB, null where one is infinite; ssim_gain: of the mean SSIMs; psnr_won,
    ssim_won: pairs in which the rectified clip has the higher value.
    """
    mean = {each.mode: each for each in means}
    plain = {mode.config.sparsity: mode for mode in modes if mode.config and mode.config.rectify == "none"}
    rows = []
    for mode in modes:
        if mode.config is None or mode.config.rectify == "none":
            continue
        other = plain[mode.config.sparsity]
        psnr_won, pairs = pairs_won(scores, mode.name, other.name, "psnr")
        ssim_won, _ = pairs_won(scores, mode.name, other.name, "ssim")
        rows.append(
            {
                "sparsity": mode.config.sparsity,
                "sparse": other.name,
                "rectified": mode.name,
                "psnr_gain": finite_or_none(mean[mode.name].psnr - mean[other.name].psnr),
                "ssim_gain": mean[mode.name].ssim - mean[other.name].ssim,
                "psnr_won": psnr_won,
                "ssim_won": ssim_won,
                "pairs": pairs,
            }
        )
    return rows


def settings_record(settings: Settings, dtype: torch.dtype, seeds: Sequence[int], prompts: int) -> dict[str, Any]:
    """What all clips have in common."""
    return {
        **dataclasses.asdict(settings),
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": prompts,
        "seeds": list(seeds),
    }
