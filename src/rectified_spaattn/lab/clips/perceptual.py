"""LPIPS with torchmetrics: needs torchvision and the weights of its AlexNet, and never downloads them by itself."""

from importlib.util import find_spec
from pathlib import Path

import torch

_WEIGHTS = "alexnet-owt-7be5be79.pth"
_LEAST_SIDE = 63  # below it a convolution of AlexNet has nothing left to pool
_FRAMES_AT_ONCE = 16


def lpips_weights() -> Path:
    """Where torchvision keeps the weights of AlexNet once they were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS


def why_no_lpips(height: int | None = None, width: int | None = None) -> str | None:
    """Why LPIPS cannot be computed of frames of this size (None: not known), and what to do; None where it can."""
    if find_spec("torchvision") is None:
        return "torchvision is not installed (pip install torchvision, of the release that goes with your torch)"
    if not lpips_weights().is_file():
        return (
            f"the weights of AlexNet are not at {lpips_weights()} (download them once: "
            "python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")')"
        )
    if min(height or _LEAST_SIDE, width or _LEAST_SIDE) < _LEAST_SIDE:
        return f"frames of {height} x {width} are too small for AlexNet, which needs sides of {_LEAST_SIDE}"
    return None


class Lpips:
    """Learned perceptual distance (AlexNet) of two clips, the mean over frames. Raises RuntimeError without weights."""

    def __init__(self, device: torch.device) -> None:
        reason = why_no_lpips()
        if reason is not None:
            raise RuntimeError(f"LPIPS: {reason}.")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._net = LearnedPerceptualImagePatchSimilarity("alex", reduction="mean", normalize=True).to(device).eval()
        self._device = device

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, reference: torch.Tensor) -> float:
        """video, reference: [T, 3, H, W], values in [0, 1], sides of 63 pixels or more. 0 for identical clips."""
        if min(video.shape[-2:]) < _LEAST_SIDE:
            raise ValueError(
                f"LPIPS: got frames of {tuple(video.shape[-2:])}; allowed: sides of {_LEAST_SIDE} or more. "
                "Leave it out: --no-lpips."
            )
        self._net.reset()
        for ours, theirs in zip(video.split(_FRAMES_AT_ONCE), reference.split(_FRAMES_AT_ONCE), strict=True):
            self._net.update(ours.to(self._device).float(), theirs.to(self._device).float())
        return float(self._net.compute())
