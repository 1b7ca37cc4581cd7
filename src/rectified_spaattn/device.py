"""The device that a command runs on."""

import torch

NAMES = ("auto", "cpu", "cuda")


def device_of(name: str, process: int | None = None) -> torch.device:
    """The device behind "auto", "cpu" or "cuda"; "auto" is a GPU where there is one.

    process: number of this process among those on the machine. GPUs are dealt out in turn, and the one of this process
    becomes torch's current one. None: the current one. Raises ValueError for another name, or where there is no GPU.
    """
    if name not in NAMES:
        raise ValueError(f"device: got {name!r}; allowed: auto, cpu or cuda.")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError(
            "device: got 'cuda', but torch finds no CUDA GPU here. Use cpu, or install a CUDA build of torch."
        )
    if name == "cpu" or not found:
        return torch.device("cpu")
    if process is not None:
        torch.cuda.set_device(process % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
