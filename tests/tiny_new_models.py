"""Real diffusers video transformers of 2024 to 2026 with random weights, one or two layers, and what forward takes.

As tiny_models: every video has the grid (4, 6, 8) in tokens, 12 blocks of 16. Output layers that start at zero are
filled, so that something comes out.
"""

from typing import Any

import diffusers
import torch

import tiny_models
from tiny_models import BATCH, HUNYUAN, TEXT, WAN, axes, masked, noise, wan_inputs

HEADS = {"num_attention_heads": 2}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random values in what was made zero: gates, modulations and last layers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


# --- MiniMax-H3: text, keyframes, audio and video in one sequence


AUDIO = 10  # two channels of 5


def minimax_h3(head_dim: int) -> torch.nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        **HEADS,
        attention_head_dim=head_dim,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=2,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def h3_inputs(model: Any, keyframes: tuple[str, ...] = ()) -> dict[str, Any]:
    """As the blocks of the modular pipeline lay it out."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    t, h, w = tiny_models.VIDEO
    tags = torch.ones(TEXT, dtype=torch.long)
    tags[3:5] = 0  # what the text encoder says of a picture
    position_ids, token_tags, video, audio, text, conditions, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, t, 2 * h, 2 * w, AUDIO // 2, (1, 2, 2), 2, 2, 0, keyframes
    )
    rows = torch.zeros(len(position_ids), dtype=torch.long)
    rows[audio], rows[video[:conditions]] = 1, 2
    return {
        "hidden_states": noise(1, len(video), 8),
        "audio_hidden_states": noise(1, AUDIO, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": torch.tensor([0.3, 0.5, 0.999]),
        "timestep_indices": rows,
        "token_tags": token_tags,
        "position_ids": position_ids,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


# --- Kandinsky


def kandinsky_axes(head_dim: int) -> tuple[int, int, int]:
    return head_dim // 2, head_dim // 4, head_dim // 4


def kandinsky5(head_dim: int) -> torch.nn.Module:
    return filled(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=2 * head_dim,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=kandinsky_axes(head_dim),
        )
    )


def kandinsky5_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, t, 2 * h, 2 * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 500.0),
        "pooled_projections": noise(BATCH, 8),
        "visual_rope_pos": [torch.arange(side) for side in (t, h, w)],
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6(head_dim: int) -> torch.nn.Module:
    return filled(
        diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=2 * head_dim,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=kandinsky_axes(head_dim),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        )
    )


def kandinsky6_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, t, 2 * h, 2 * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "pooled_projections": noise(BATCH, 8),
        "timestep": torch.full((BATCH,), 500.0),
        "audio_hidden_states": noise(BATCH, 9, 4),
    }


def kandinsky6_sr(head_dim: int) -> torch.nn.Module:
    """NABLA keeps every block at this threshold."""
    return filled(
        diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=2 * head_dim,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=kandinsky_axes(head_dim),
            nabla_threshold=1.0,
        )
    )


def kandinsky6_sr_inputs(model: Any) -> dict[str, Any]:
    return {"hidden_states": noise(1, 3, 8, 8, 9), "timestep": torch.full((1,), 500.0)}


# --- like Wan


def chronoedit(head_dim: int) -> torch.nn.Module:
    return diffusers.ChronoEditTransformer3DModel(**{**WAN, "attention_head_dim": head_dim})


def anyflow(head_dim: int) -> torch.nn.Module:
    return diffusers.AnyFlowTransformer3DModel(**{**WAN, "attention_head_dim": head_dim})


def anyflow_inputs(model: Any) -> dict[str, Any]:
    inputs = wan_inputs(model)
    frames = inputs["hidden_states"].shape[2]
    times = torch.full((BATCH, frames), 500.0)
    return {
        **inputs,
        "hidden_states": inputs["hidden_states"].transpose(1, 2).contiguous(),
        "timestep": times,
        "r_timestep": times - 200,
    }


def cosmos(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": head_dim,
        "num_layers": 2,
        "mlp_ratio": 1.0,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "patch_size": (1, 2, 2),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
    }
    return diffusers.CosmosTransformer3DModel(**{**settings, **overrides})


def cosmos_inputs(model: Any) -> dict[str, Any]:
    t, h, w = tiny_models.VIDEO
    return {
        "hidden_states": noise(BATCH, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((BATCH,), 0.5),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "fps": 24,
    }


# Cosmos Predict 2.5 and Transfer 2.5: a projection of the text, and a picture in cross-attention
COSMOS25 = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 16}
COSMOS25_PICTURE = {"img_context_dim_in": 8, "img_context_dim_out": 32, "img_context_num_tokens": 4}


def cosmos25_inputs(model: Any) -> dict[str, Any]:
    text = noise(BATCH, TEXT, 24)
    times = torch.full((BATCH, 1, 4, 1, 1), 0.5)
    context = (text, noise(BATCH, 4, 8)) if model.config.img_context_dim_in else text
    return {**cosmos_inputs(model), "timestep": times, "encoder_hidden_states": context}


# --- joint attention


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
    """160 history tokens and more than half of the video in front of it, at three sizes."""
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
