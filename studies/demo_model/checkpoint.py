"""What a run keeps between calls: weights and averages in float16, in files of 15 MiB at most, and its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PART_BYTES = 15 * 2**20


def save(folder: Path, networks: dict[str, nn.Module], numbers: dict[str, Any]) -> None:
    """Write the networks' weights, rounded to float16, and the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{key}.{name}": parameter.detach().half().cpu().contiguous()
        for key, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    part: dict[str, Tensor] = {}
    index = 0
    for name, tensor in tensors.items():
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > PART_BYTES:
            save_file(part, folder / f"weights-{index}.safetensors")
            part, index = {}, index + 1
        part[name] = tensor
    save_file(part, folder / f"weights-{index}.safetensors")
    (folder / "run.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load(folder: Path, networks: dict[str, nn.Module]) -> dict[str, Any]:
    """Fill networks from a folder that `save` wrote and return its numbers; RuntimeError for another folder."""
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files or not (folder / "run.json").is_file():
        raise RuntimeError(f"no run in {folder}: it needs run.json and weights-*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for key, network in networks.items():
        for name, parameter in network.named_parameters():
            parameter.copy_(tensors[f"{key}.{name}"])
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
