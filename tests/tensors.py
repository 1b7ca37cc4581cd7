"""Queries, keys and values like those of a video."""

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def video_like(
    seed: int, batch: int, sequence: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    """q, k, v [B, S, H, D] with runs of similar tokens, so that some blocks are worth compensating and some are not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(noise: float) -> torch.Tensor:
        runs = torch.randn(batch, -(-sequence // 16), heads, head_dim, generator=generator)
        smooth = runs.repeat_interleave(16, dim=1)[:, :sequence]
        return (smooth + noise * torch.randn(batch, sequence, heads, head_dim, generator=generator)).to(dtype)

    return draw(0.3), draw(0.3), draw(1.0)
