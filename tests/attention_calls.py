"""Attention calls as a capture gives them, made up so that nearby tokens are alike."""

import torch

from rectified_spaattn import TokenLayout
from rectified_spaattn.lab.calls.capture import AttentionCall


def smooth_call(
    grid: tuple[int, int, int] = (4, 8, 8), heads: int = 2, text: int = 5, sharpness: float = 2.0
) -> AttentionCall:
    """Tokens that are alike where they are near, as in a video, so that some blocks matter more than others."""
    generator = torch.Generator().manual_seed(0)
    t, h, w = (torch.arange(side) / side for side in grid)
    places = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).view(-1, 3)
    waves = torch.randn(3, heads * 16, generator=generator) * 4
    video = (places @ waves).sin().view(1, -1, heads, 16)
    words = torch.randn(1, text, heads, 16, generator=generator)
    tokens = torch.cat([video, words], dim=1)
    q, k, v = (tokens * sharpness + torch.randn(tokens.shape, generator=generator) * 0.3 for _ in range(3))
    mask = torch.ones(1, text, dtype=torch.bool)
    mask[:, text // 2 :] = False
    layout = TokenLayout.build(grid, text)
    return AttentionCall(q=q, k=k, v=v, text_mask=mask, layout=layout, layer=0, name="made up", step=0)
