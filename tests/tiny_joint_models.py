"""More real video transformers with random weights, as tiny_video_models: joint attention, and ones of 2024."""

from typing import Any

import diffusers
import torch

import tiny_models
from tiny_models import BATCH, HUNYUAN, TEXT, axes, masked, noise
from tiny_video_models import HEADS


def motif_video(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": head_dim,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "mlp_ratio": 1.0,
        "text_embed_dim": 16,
        "image_embed_dim": 8,
        "rope_axes_dim": axes(head_dim),
        "enable_text_cross_attention_dual": True,
    }
    return diffusers.MotifVideoTransformer3DModel(**{**settings, **overrides})


def motif_inputs(model: Any, image: bool = False) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((BATCH,), 500),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "encoder_attention_mask": masked(12, 5),
        "image_embeds": noise(BATCH, 3, 8) if image else None,
    }


def mochi(head_dim: int) -> torch.nn.Module:
    model: Any = diffusers.MochiTransformer3DModel(
        **HEADS,
        attention_head_dim=head_dim,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )
    torch.nn.init.normal_(model.pos_frequencies, generator=torch.Generator().manual_seed(1))
    return model  # type: ignore[no-any-return]


def mochi_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500),
        "encoder_attention_mask": masked(12, 5),
    }


def allegro(head_dim: int) -> torch.nn.Module:
    return diffusers.AllegroTransformer3DModel(
        **HEADS,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=2 * head_dim,
        sample_height=12,
        sample_width=16,
        sample_frames=4,
        caption_channels=16,
    )


def allegro_inputs(model: Any) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    t, h, w = tiny_models.VIDEO
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=model.config.attention_head_dim, crops_coords=((0, 0), (h, w)), grid_size=(h, w), temporal_size=t
    )
    grid = torch.cartesian_prod(*(side.long() for side in (grid_t, grid_h, grid_w)))
    rotary = tuple(freqs), tuple(grid[:, i].view(1, -1) for i in range(3))
    return {
        "hidden_states": noise(BATCH, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500),
        "encoder_attention_mask": masked(12, 5).float(),
        "image_rotary_emb": rotary,
    }


def easyanimate(head_dim: int) -> torch.nn.Module:
    return diffusers.EasyAnimateTransformer3DModel(
        **HEADS,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=16,
        sample_height=12,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        text_embed_dim_t5=8,
    )


def easyanimate_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": noise(BATCH, 7, 16),
        "encoder_hidden_states_t5": noise(BATCH, 5, 8),
    }


def consisid(head_dim: int) -> torch.nn.Module:
    return diffusers.ConsisIDTransformer3DModel(
        **HEADS,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=12,
        sample_frames=13,
        max_text_seq_length=TEXT,
    )


def consisid_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, t, 4, 2 * h, 2 * w),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500),
    }


def framepack(head_dim: int) -> torch.nn.Module:
    settings = {**HUNYUAN, "attention_head_dim": head_dim, "rope_axes_dim": axes(head_dim), "patch_size": 2}
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        **settings, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
    )


def framepack_inputs(model: Any, batch: int = BATCH) -> dict[str, Any]:
    """124 history tokens of three sizes before the video."""
    h, w = 12, 16
    history = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 16}
    indices = {f"indices_{name}": torch.arange(frames) for name, frames in history.items()}
    return {
        "hidden_states": noise(batch, 4, 4, h, w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": masked(12, 5)[-batch:],
        "pooled_projections": noise(batch, 8),
        "image_embeds": noise(batch, 3, 8),
        "indices_latents": torch.arange(4),
        "guidance": torch.full((batch,), 6000.0),
        **{name: noise(batch, 4, frames, h, w) for name, frames in history.items()},
        **indices,
    }
