"""Several processes on one job: who does what, on which device."""

from datetime import timedelta
from typing import Any

import torch

# A process that is done waits for the others, which may have hours of work left.
_PATIENCE = timedelta(days=14)


def processes() -> Any:
    """accelerate's PartialState: alone, or one of those that `accelerate launch` or `torchrun` started.

    They only exchange files and a few small objects, over gloo; so more of them than GPUs may be started.
    """
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=_PATIENCE)


def device_of(name: str, state: Any) -> torch.device:
    """The device of this process; GPUs are dealt out in turn. Raises ValueError for a device that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {name!r}; allowed: auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no CUDA GPU; allowed here: cpu. Or install a CUDA build.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", state.local_process_index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
