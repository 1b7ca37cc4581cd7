"""Queries, keys and values like those of a video."""

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def video_like(
    seed: int,
    batch: int,
    sequence: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    key_heads: int | None = None,
) -> Tensors:
    """q, k, v [B, S, H, D] with runs of similar tokens, so that some blocks are worth compensating and some are not.

    key_heads: of k and v, as many as `heads` where None.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(noise: float, heads: int = key_heads or heads) -> torch.Tensor:
        runs = torch.randn(batch, -(-sequence // 16), heads, head_dim, generator=generator)
        smooth = runs.repeat_interleave(16, dim=1)[:, :sequence]
        return (smooth + noise * torch.randn(batch, sequence, heads, head_dim, generator=generator)).to(dtype)

    return draw(0.3, heads), draw(0.3), draw(1.0)
