"""Tiny models of ComfyUI, one a class or a way to use it."""

from dataclasses import dataclass, field
from typing import Any

import torch

TEXT, WIDTH = 8, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model.

    layers    those whose self-attention can run sparse
    extra     entries of its conditioning
    params    the dataclass that its config fills, whose other fields, which differ between versions, are None
    audio     shape of what is denoised beside the video
    channels  of the text
    padding   text tokens in front that are the same for every prompt
    guidance  1 runs one prompt alone, which masks and references of HunyuanVideo are written for
    """

    family: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    layers: int
    extra: dict[str, Any] = field(default_factory=dict)
    params: str = ""
    audio: tuple[int, ...] = ()
    channels: int = 32
    padding: int = 0
    guidance: float = 5.0


FLUX = {
    "in_channels": 16,
    "context_in_dim": 32,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 256,
    "qkv_bias": True,
    "vec_in_dim": 32,
    "guidance_embed": True,
    "out_channels": 16,
    "txt_ids_dims": [],
}
POOLED = {"pooled_output": torch.zeros(1, 32), "guidance": 3.0}
WAN = {
    "image_model": "wan2.1",
    "dim": WIDTH,
    "ffn_dim": 128,
    "num_heads": 4,
    "num_layers": 2,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "patch_size": (1, 2, 2),
    "text_len": TEXT,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
}
HUNYUAN = {**FLUX, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "axes_dim": [4, 6, 6]}
HUNYUAN_PARAMS = "comfy.ldm.hunyuan_video.model.HunyuanVideoParams"
FLUX_PARAMS = "comfy.ldm.flux.model.FluxParams"
LETTERS = {"conditioning_byt5small"}  # text, too: other for every prompt
VIDEO = (1, 16, 5, 16, 16)  # 320 tokens
CASES = {
    "Wan": Case(family="WAN21_T2V", config=WAN, latent=VIDEO, layers=2),
    "Wan I2V": Case(family="WAN21_I2V", config=WAN | {"in_dim": 36}, latent=VIDEO, layers=2),
    "Wan with a reference": Case(
        family="WAN21_T2V",
        config=WAN | {"in_dim_ref_conv": 16},
        latent=VIDEO,
        layers=2,
        extra={"reference_latents": [torch.zeros(1, 16, 1, 16, 16)]},
    ),
    "HunyuanVideo": Case(
        family="HunyuanVideo", params=HUNYUAN_PARAMS, config=HUNYUAN, latent=VIDEO, layers=4, extra=POOLED
    ),
    "HunyuanVideo with padded text": Case(
        family="HunyuanVideo",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN,
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])},
        guidance=1.0,
    ),
    "HunyuanVideo with a reference": Case(
        family="HunyuanVideo",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN,
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"ref_latent": torch.zeros(1, 16, 1, 16, 16)},
        guidance=1.0,
    ),
    "HunyuanVideo 1.5": Case(
        family="HunyuanVideo15",
        params=HUNYUAN_PARAMS,
        config=HUNYUAN | {"in_channels": 33, "use_cond_type_embedding": True, "vision_in_dim": 32, "byt5": True},
        latent=VIDEO,
        layers=4,
        extra=POOLED | {"conditioning_byt5small": torch.zeros(1, 4, 1472)},
    ),
    "Flux": Case(
        family="Flux",
        params=FLUX_PARAMS,
        config=FLUX | {"image_model": "flux", "patch_size": 2, "axes_dim": [4, 6, 6]},
        latent=(1, 16, 32, 32),
        layers=4,
        extra=POOLED,
    ),
    "Flux with a reference": Case(
        family="Flux",
        params=FLUX_PARAMS,
        config=FLUX | {"image_model": "flux", "patch_size": 2, "axes_dim": [4, 6, 6]},
        latent=(1, 16, 32, 32),
        layers=4,
        extra=POOLED | {"reference_latents": [torch.zeros(1, 16, 16, 16)]},
    ),
    "Flux.2": Case(
        family="Flux2",
        params=FLUX_PARAMS,
        config=FLUX
        | {"image_model": "flux2", "patch_size": 1, "axes_dim": [4, 4, 4, 4], "in_channels": 128, "out_channels": 128}
        | {"txt_ids_dims": [3], "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False}
        | {"ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0},
        latent=(1, 128, 16, 16),
        layers=4,
        extra=POOLED,
        padding=504,
    ),
    "Chroma": Case(
        family="Chroma",
        params="comfy.ldm.chroma.model.ChromaParams",
        config=FLUX
        | {"image_model": "chroma", "patch_size": 2, "axes_dim": [4, 6, 6], "in_channels": 64, "out_channels": 64}
        | {"in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 2},
        latent=(1, 16, 32, 32),
        layers=4,
        extra=POOLED,
    ),
    "LTX": Case(
        family="LTXV",
        config={
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "caption_channels": 32,
            "num_layers": 2,
        },
        latent=(1, 128, 5, 8, 8),
        layers=2,
        extra={"attention_mask": torch.ones(1, TEXT, dtype=torch.int64)},
    ),
    "LTX-2 with audio": Case(
        family="LTXAV",
        config={
            "image_model": "ltxav",
            "in_channels": 128,
            "audio_in_channels": 128,
            "cross_attention_dim": WIDTH,
            "audio_cross_attention_dim": WIDTH // 2,
            "attention_head_dim": 16,
            "audio_attention_head_dim": 8,
            "num_attention_heads": 4,
            "audio_num_attention_heads": 4,
            "caption_channels": 32,
            "num_layers": 2,
        },
        latent=(1, 128, 5, 8, 8),
        audio=(1, 8, 320, 16),  # as many tokens as the video has
        channels=64,  # half of them for either
        layers=2,
        extra={"attention_mask": torch.ones(1, TEXT, dtype=torch.int64)},
    ),
    "Qwen-Image": Case(
        family="QwenImage",
        config={
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        latent=(1, 16, 1, 32, 32),
        layers=2,
    ),
}
