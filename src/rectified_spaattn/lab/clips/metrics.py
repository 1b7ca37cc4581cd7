"""How far a clip is from the same clip made with full attention (PSNR, SSIM, LPIPS), and how much it flickers.

One value a clip. LPIPS needs torchvision and the weights of its AlexNet, and never downloads them by itself.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_SSIM_FRAMES = 8  # at once: the windows of a frame take ten times its memory
_WEIGHTS = "alexnet-owt-7be5be79.pth"
_LEAST_SIDE = 63  # below it a convolution of AlexNet has nothing left to pool
_LPIPS_FRAMES = 16  # at once


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over all frames, pixels and channels of a clip: float32 [B].

    video, reference: [B, T, 3, H, W], floating, values in [0, 1] (the peak is 1). Higher is closer; identical clips
    give inf. Raises TypeError or ValueError for clips of another kind or of different shapes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(video, reference)
    clip = tuple(range(1, video.ndim))
    return peak_signal_noise_ratio(video.float(), reference.float(), data_range=1.0, reduction="none", dim=clip)


def frame_psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The same of every frame by itself: float32 [B, T]. Raises as `psnr` does."""
    _check(video, reference)
    return psnr(video.flatten(0, 1)[:, None], reference.flatten(0, 1)[:, None]).view(video.shape[:2])


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame, averaged over a clip: float32 [B]. The rest is that of `frame_ssim`."""
    return frame_ssim(video, reference).mean(1)


def frame_ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame: float32 [B, T], 1 for identical ones.

    video, reference: [B, T, 3, H, W], floating, values in [0, 1]; H and W at least 11, the side of the Gaussian window
    (sigma 1.5). Raises TypeError or ValueError for clips of another kind or of different shapes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(video, reference)
    if min(video.shape[-2:]) < 11:
        raise ValueError(f"video: got frames of {tuple(video.shape[-2:])}; allowed: 11 x 11 pixels or more.")
    parts = (clip.float().flatten(0, 1).split(_SSIM_FRAMES) for clip in (video, reference))
    frames = torch.cat(
        [
            structural_similarity_index_measure(some, others, data_range=1.0, reduction="none").view(-1)
            for some, others in zip(*parts, strict=True)
        ]
    )
    return frames.view(video.shape[:2])


def flicker(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring frames: float32 [B], 0 for a still, in units of the value range.

    video: [B, T, 3, H, W], floating, values in [0, 1], T at least 2. Motion counts, too, so compare clips of the same
    prompt and seed. Raises TypeError or ValueError for clips of another kind.
    """
    _check(video, video)
    if video.shape[1] < 2:
        raise ValueError(f"video: got {video.shape[1]} frame; allowed: 2 or more.")
    return (video[:, 1:].float() - video[:, :-1].float()).abs().mean((1, 2, 3, 4))


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
        for ours, theirs in zip(video.split(_LPIPS_FRAMES), reference.split(_LPIPS_FRAMES), strict=True):
            self._net.update(ours.to(self._device).float(), theirs.to(self._device).float())
        return float(self._net.compute())


def _check(video: torch.Tensor, reference: torch.Tensor) -> None:
    for name, clip in (("video", video), ("reference", reference)):
        if not isinstance(clip, torch.Tensor) or not clip.is_floating_point():
            got = clip.dtype if isinstance(clip, torch.Tensor) else type(clip).__name__
            raise TypeError(f"{name}: got {got}; allowed: a floating tensor [B, T, 3, H, W] with values in [0, 1].")
        if clip.ndim != 5 or clip.shape[2] != 3 or 0 in clip.shape:
            raise ValueError(f"{name}: got shape {tuple(clip.shape)}; allowed: [B, T, 3, H, W].")
        low, high = clip.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails, too
            raise ValueError(f"{name}: got values from {low:g} to {high:g}; allowed: 0 to 1. Scale the frames first.")
    if video.shape != reference.shape:
        raise ValueError(f"video: got shape {tuple(video.shape)}; allowed: reference's, {tuple(reference.shape)}.")
