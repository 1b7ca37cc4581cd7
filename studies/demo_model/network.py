"""The network as it is trained: diffusers' HunyuanVideo transformer made small, on pixels, and the caption encoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from rectified_spaattn.lab.demo_model.model import (
    CAPTION_LENGTH,
    PATCH_SIZE,
    START,
    VOCABULARY,
    CaptionEncoder,
    tokenize,
)

from .recipe import Recipe

LEAST_SIGMA = 0.05  # a clean prediction's velocity divides by the noise level, and by no less than this


class Unmasked(HunyuanVideoAttnProcessor2_0):
    """Attention without the mask, which would be all True here and keep kernels without masks away."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class FrameRope(nn.Module):
    """The transformer's rotary embedding for evenly spaced frames of a longer clip: those of `frames`."""

    def __init__(self, rope: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.rope, self.num_frames = rope, num_frames
        self.frames = range(num_frames)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        whole = self.rope(hidden_states[:, :, :1].expand(-1, -1, self.num_frames, -1, -1))
        chosen = slice(self.frames.start, self.frames.stop, self.frames.step)  # a list of frames would wait for the GPU
        return tuple(part.unflatten(0, (self.num_frames, -1))[chosen].flatten(0, 1) for part in whole)


def build_transformer(recipe: Recipe) -> HunyuanVideoTransformer3DModel:
    """A small HunyuanVideoTransformer3DModel with fresh float32 weights; every block is the identity at first."""
    width = recipe.heads * 64
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=3,
        out_channels=3,
        num_attention_heads=recipe.heads,
        attention_head_dim=64,
        num_layers=recipe.dual_blocks,
        num_single_layers=recipe.single_blocks,
        num_refiner_layers=recipe.refiner_blocks,
        patch_size=PATCH_SIZE,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=width,
        pooled_projection_dim=width,
        rope_axes_dim=(16, 24, 24),
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_caption_encoder(recipe: Recipe) -> CaptionEncoder:
    return CaptionEncoder(len(VOCABULARY) + START + 1, CAPTION_LENGTH, recipe.heads * 64)


class Network(nn.Module):
    """Both trained parts, and what their output means: `prediction` is "velocity" (noise - video) or "clean"."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.transformer = build_transformer(recipe)
        for block in [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]:
            block.attn.processor = Unmasked()
        self.transformer.rope = FrameRope(self.transformer.rope, recipe.frames)
        self.caption_encoder = build_caption_encoder(recipe)
        self.prediction = recipe.prediction

    def use_frames(self, frames: range) -> None:
        """The clips that follow hold these frames of a whole clip."""
        self.transformer.rope.frames = frames

    def forward(self, noisy: Tensor, sigmas: Tensor, ids: Tensor) -> Tensor:
        """Velocity float32 [B, 3, T, H, W] of `noisy`, the same shape, at noise levels `sigmas` [B] in (0, 1]."""
        embeds, summary = self.caption_encoder(ids)
        output = self.transformer(
            hidden_states=noisy,
            timestep=sigmas * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones_like(ids, dtype=torch.bool),
            pooled_projections=summary,
            return_dict=False,
        )[0].float()
        if self.prediction == "velocity":
            return output
        return (noisy - output) / sigmas.clamp_min(LEAST_SIGMA).view(-1, 1, 1, 1, 1)


def forward_flops(recipe: Recipe, frames: int, height: int = 64, width: int = 64) -> float:
    """Floating-point operations of one forward of one clip: matrix products and attention."""
    channels = recipe.heads * 64
    tokens = frames * (height // PATCH_SIZE) * (width // PATCH_SIZE)
    both = tokens + CAPTION_LENGTH
    blocks = recipe.dual_blocks + recipe.single_blocks
    return blocks * (2 * 12 * channels**2 * both + 4 * both**2 * channels) + 2 * 2 * 48 * channels * tokens


@torch.no_grad()
def generate(
    network: Network,
    captions: Sequence[str],
    noise: Tensor,
    steps: int = 12,
    guidance: float = 1.0,
    shift: float = 3.0,
    span: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Videos float32 in [-1, 1] of the shape of `noise` [B, 3, T, H, W], by Euler steps over shifted noise levels.

    `guidance` above 1 adds a forward without caption at the levels inside `span`.
    """
    device = noise.device
    ids, empty = tokenize(captions).to(device), tokenize([""] * len(captions)).to(device)
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    levels = [*(shift * even / (1 + (shift - 1) * even)).tolist(), 0.0]
    video = noise
    for level, following in itertools.pairwise(levels):
        sigmas = torch.full((len(captions),), level, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = network(video, sigmas, ids)
            if guidance > 1 and span[0] <= level <= span[1]:
                free = network(video, sigmas, empty)
                velocity = free + guidance * (velocity - free)
        video = video + (following - level) * velocity
    return video.clamp(-1, 1)
