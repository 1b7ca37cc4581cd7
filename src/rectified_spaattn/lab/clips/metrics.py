"""How far a clip is from the same clip made with full attention (PSNR, SSIM), and how much it flickers; one value a
clip. LPIPS is in perceptual.py.
"""

import torch

_FRAMES_AT_ONCE = 8  # the windows of a frame take ten times its memory


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over all frames, pixels and channels of a clip: float32 [B].

    video, reference: [B, T, 3, H, W], floating, values in [0, 1] (the peak is 1). Higher is closer; identical clips
    give inf. Raises TypeError or ValueError for clips of another kind or of different shapes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(video, reference)
    clip = tuple(range(1, video.ndim))
    return peak_signal_noise_ratio(video.float(), reference.float(), data_range=1.0, reduction="none", dim=clip)


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame, averaged over a clip: float32 [B], 1 for identical clips.

    video, reference: [B, T, 3, H, W], floating, values in [0, 1]; H and W at least 11, the side of the Gaussian window
    (sigma 1.5). Raises TypeError or ValueError for clips of another kind or of different shapes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(video, reference)
    if min(video.shape[-2:]) < 11:
        raise ValueError(f"video: got frames of {tuple(video.shape[-2:])}; allowed: 11 x 11 pixels or more.")
    parts = (clip.float().flatten(0, 1).split(_FRAMES_AT_ONCE) for clip in (video, reference))
    frames = torch.cat(
        [
            structural_similarity_index_measure(some, others, data_range=1.0, reduction="none").view(-1)
            for some, others in zip(*parts, strict=True)
        ]
    )
    return frames.view(video.shape[:2]).mean(1)


def flicker(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring frames: float32 [B], 0 for a still, in units of the value range.

    video: [B, T, 3, H, W], floating, values in [0, 1], T at least 2. Motion counts, too, so compare clips of the same
    prompt and seed. Raises TypeError or ValueError for clips of another kind.
    """
    _check(video, video)
    if video.shape[1] < 2:
        raise ValueError(f"video: got {video.shape[1]} frame; allowed: 2 or more.")
    return (video[:, 1:].float() - video[:, :-1].float()).abs().mean((1, 2, 3, 4))


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
