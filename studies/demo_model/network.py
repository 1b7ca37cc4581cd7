"""The demo model with fresh weights: a caption encoder, and diffusers' HunyuanVideo transformer made small."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH, PATCH_SIZE, START_ID, VOCABULARY, CaptionEncoder


def build_caption_encoder(embed_dim: int = 192) -> CaptionEncoder:
    """A caption encoder with fresh weights, float32 on the CPU."""
    return CaptionEncoder(len(VOCABULARY) + START_ID + 1, CAPTION_LENGTH, embed_dim)


def build_transformer(
    num_heads: int = 3, num_layers: int = 2, num_single_layers: int = 4, embed_dim: int = 192, **overrides: Any
) -> HunyuanVideoTransformer3DModel:
    """A small HunyuanVideoTransformer3DModel on pixels, float32 on the CPU, with weights ready for training.

    Gates and the output layer start at zero, so every block is the identity at first. `overrides` go to the diffusers
    class as they are.
    """
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "num_attention_heads": num_heads,
        "attention_head_dim": 64,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_refiner_layers": 1,
        "patch_size": PATCH_SIZE,
        "patch_size_t": 1,
        "guidance_embeds": False,
        "text_embed_dim": embed_dim,
        "pooled_projection_dim": embed_dim,
        "rope_axes_dim": (16, 24, 24),
    }
    transformer = HunyuanVideoTransformer3DModel(**(config | overrides))
    _zero_start(transformer)
    return transformer


def _zero_start(transformer: HunyuanVideoTransformer3DModel) -> None:
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
