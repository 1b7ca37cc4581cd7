"""Real diffusers transformers of every supported class with random weights, and what their forward takes.

Each builder takes the size of a head, so that the same model is made tiny or as the kernels like it.
Every video or image has the grid (4, 6, 8) or (1, 16, 12) in tokens: 12 blocks of 16.
"""

from typing import Any

import diffusers
import torch

VIDEO = (4, 6, 8)
IMAGE = (1, 16, 12)
BATCH = 2
TEXT = 12


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def axes(head_dim: int) -> tuple[int, int, int]:
    """RoPE sizes along frames, rows and columns, in the proportion (16, 56, 56) of the full models."""
    side = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * side, side, side


def masked(*lengths: int, total: int = TEXT) -> torch.Tensor:
    return torch.arange(total)[None] < torch.tensor(lengths)[:, None]


# --- Wan and its kin


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan(head_dim: int, **overrides: Any) -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(**{**WAN, "attention_head_dim": head_dim, **overrides})


def wan_inputs(model: Any) -> dict[str, Any]:
    t, h, w = VIDEO
    return {
        "hidden_states": noise(BATCH, model.config.in_channels, t, 2 * h, 2 * w),
        "timestep": torch.full((BATCH,), 500),
        "encoder_hidden_states": noise(BATCH, 512 if model.config.image_dim else TEXT, 16),
    }


def wan_image_inputs(model: Any) -> dict[str, Any]:
    return {**wan_inputs(model), "encoder_hidden_states_image": noise(BATCH, 5, model.config.image_dim)}


def wan_token_timesteps(model: Any) -> dict[str, Any]:
    """Wan 2.2 TI2V: a timestep for every token, 0 in the first frame."""
    t, h, w = VIDEO
    timestep = torch.full((BATCH, t * h * w), 500)
    timestep[:, : h * w] = 0
    return {**wan_inputs(model), "timestep": timestep}


def vace(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {**WAN, "attention_head_dim": head_dim, "vace_layers": [0, 1], "vace_in_channels": 24}
    return diffusers.WanVACETransformer3DModel(**{**settings, **overrides})


def vace_inputs(model: Any) -> dict[str, Any]:
    t, h, w = VIDEO
    return {**wan_inputs(model), "control_hidden_states": noise(BATCH, 24, t, 2 * h, 2 * w)}


def animate(head_dim: int) -> torch.nn.Module:
    return diffusers.WanAnimateTransformer3DModel(
        **{
            **WAN,
            "attention_head_dim": head_dim,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "image_dim": 4,
            "added_kv_proj_dim": 2 * head_dim,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        }
    )


def animate_inputs(model: Any) -> dict[str, Any]:
    t, h, w = VIDEO
    frames = 4 * (t - 1) - 3  # the face encoder halves the frames twice
    return {
        **wan_image_inputs(model),
        "pose_hidden_states": noise(BATCH, 4, t - 1, 2 * h, 2 * w),
        "face_pixel_values": noise(BATCH, 3, frames, 16, 16),
    }


def skyreels(head_dim: int, **overrides: Any) -> torch.nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**{**WAN, "attention_head_dim": head_dim, **overrides})


def skyreels_forcing_inputs(model: Any) -> dict[str, Any]:
    timestep = torch.tensor([[0, 200, 300, 500]] * BATCH)
    return {**wan_inputs(model), "timestep": timestep, "enable_diffusion_forcing": True, "fps": [0]}


# --- joint attention with text after the video


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
}


def hunyuan(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {**HUNYUAN, "attention_head_dim": head_dim, "rope_axes_dim": axes(head_dim), **overrides}
    return diffusers.HunyuanVideoTransformer3DModel(**settings)


def hunyuan_inputs(model: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, model.config.in_channels, *VIDEO),
        "timestep": torch.full((BATCH,), 500),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "encoder_attention_mask": masked(12, 5),
        "pooled_projections": noise(BATCH, 8),
        "guidance": torch.full((BATCH,), 6000.0) if model.config.guidance_embeds else None,
    }


def hunyuan15(head_dim: int, in_channels: int = 4) -> torch.nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=axes(head_dim),
        target_size=16,
    )


def hunyuan15_inputs(model: Any, image: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, *VIDEO),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": noise(BATCH, 7, 16),
        "encoder_attention_mask": masked(7, 2, total=7),
        "encoder_hidden_states_2": noise(BATCH, 5, 8),
        "encoder_attention_mask_2": masked(0, 4, total=5),
        "image_embeds": noise(BATCH, 3, 12) if image else torch.zeros(BATCH, 3, 12),
    }


# --- joint attention with text before the video or image


def cogvideox(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 16,
        "sample_height": 12,
        "sample_frames": 13,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    return diffusers.CogVideoXTransformer3DModel(**{**settings, **overrides})


def cogvideox15(head_dim: int, **overrides: Any) -> torch.nn.Module:
    return cogvideox(head_dim, **{"patch_size_t": 2, "patch_bias": False, **overrides})


def cogvideox_inputs(model: Any) -> dict[str, Any]:
    config, (t, h, w) = model.config, VIDEO
    angles = noise(t * h * w, config.attention_head_dim // 2).repeat_interleave(2, dim=1)
    return {
        "hidden_states": noise(BATCH, t * (config.patch_size_t or 1), config.in_channels, 2 * h, 2 * w),
        "timestep": torch.full((BATCH,), 500),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "image_rotary_emb": (angles.cos(), angles.sin()) if config.use_rotary_positional_embeddings else None,
        "ofs": torch.full((1,), 2.0) if config.ofs_embed_dim else None,
    }


def flux(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": head_dim,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": axes(head_dim),
    }
    return diffusers.FluxTransformer2DModel(**{**settings, **overrides})


def image_ids(height: int, width: int, columns: int = 3, frame: float = 0) -> torch.Tensor:
    ids = torch.zeros(height, width, columns)
    ids[..., 0], ids[..., 1], ids[..., 2] = frame, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


def flux_inputs(model: Any) -> dict[str, Any]:
    _, h, w = IMAGE
    return {
        "hidden_states": noise(BATCH, h * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "pooled_projections": noise(BATCH, 8),
        "timestep": torch.full((BATCH,), 0.5),
        "img_ids": image_ids(h, w),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2(head_dim: int) -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(head_dim // 4,) * 4,
    )


def flux2_inputs(model: Any) -> dict[str, Any]:
    _, h, w = IMAGE
    text = torch.zeros(BATCH, TEXT, 4)
    text[..., 3] = torch.arange(TEXT)
    return {
        "hidden_states": noise(BATCH, h * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 0.5),
        "img_ids": image_ids(h, w, columns=4).expand(BATCH, -1, -1),
        "txt_ids": text,
        "guidance": torch.full((BATCH,), 4.0),
    }


def qwen(head_dim: int) -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=axes(head_dim),
    )


def qwen_inputs(model: Any) -> dict[str, Any]:
    _, h, w = IMAGE
    return {
        "hidden_states": noise(BATCH, h * w, 16),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "encoder_hidden_states_mask": masked(12, 5).long(),
        "timestep": torch.full((BATCH,), 0.5),
        "img_shapes": [[IMAGE]] * BATCH,
    }


# --- LTX


def ltx(head_dim: int) -> torch.nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        cross_attention_dim=2 * head_dim,
        num_layers=2,
        caption_channels=16,
    )


def ltx_inputs(model: Any) -> dict[str, Any]:
    t, h, w = VIDEO
    return {
        "hidden_states": noise(BATCH, t * h * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_attention_mask": masked(12, 5).float(),
        "num_frames": t,
        "height": h,
        "width": w,
    }


def ltx2(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": head_dim,
        "cross_attention_dim": 2 * head_dim,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": head_dim // 2,
        "audio_cross_attention_dim": head_dim,
        "num_layers": 2,
        "caption_channels": 16,
        "rope_double_precision": False,
    }
    return diffusers.LTX2VideoTransformer3DModel(**{**settings, **overrides})


def ltx2_inputs(model: Any) -> dict[str, Any]:
    return {
        **ltx_inputs(model),
        "timestep": torch.full((BATCH, 1), 500.0),
        "audio_hidden_states": noise(BATCH, 9, 4),
        "audio_encoder_hidden_states": noise(BATCH, TEXT, 16),
        "audio_encoder_attention_mask": masked(12, 5).float(),
        "audio_num_frames": 9,
    }


def ltx_coordinates(model: Any) -> dict[str, Any]:
    """As the pipeline with conditions calls it: coordinates in place of the sides."""
    t, h, w = VIDEO
    sides = torch.arange(t) * 8 / 25, torch.arange(h) * 32, torch.arange(w) * 32
    coords = torch.stack(torch.meshgrid(*(side.float() for side in sides), indexing="ij")).flatten(1)
    inputs = {**ltx_inputs(model), "video_coords": coords.expand(BATCH, -1, -1)}
    return {name: value for name, value in inputs.items() if name not in ("num_frames", "height", "width")}
