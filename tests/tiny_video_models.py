"""Real diffusers video transformers of later years with random weights, two layers, and what their forward takes.

As tiny_models: every video has the grid (4, 6, 8) in tokens, 12 blocks of 16. Output layers that start at zero are
filled, so that something comes out.
"""

from typing import Any

import diffusers
import torch

import tiny_models
from tiny_models import BATCH, TEXT, WAN, noise, wan_inputs

HEADS = {"num_attention_heads": 2}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random values in what was made zero: gates, modulations and last layers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


# --- MiniMax-H3: text, keyframes, audio and video in one sequence


AUDIO = 10  # two channels of 5


def minimax_h3(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        **HEADS,
        "attention_head_dim": head_dim,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 2,
        "audio_in_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }
    return diffusers.MiniMaxH3Transformer3DModel(**{**settings, **overrides})


def h3_inputs(model: Any, keyframes: tuple[str, ...] = ()) -> dict[str, Any]:
    """As the blocks of the modular pipeline lay it out."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    t, h, w = tiny_models.VIDEO
    tags = torch.ones(TEXT, dtype=torch.long)
    tags[3:5] = 0  # what the text encoder says of a picture
    position_ids, token_tags, video, audio, text, conditions, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, t, 2 * h, 2 * w, AUDIO // 2, (1, 2, 2), 2, 2, 0, keyframes
    )
    return h3_forward(position_ids, token_tags, video, audio, text, conditions)


def h3_reference_inputs(model: Any) -> dict[str, Any]:
    """A reference video of the same length with its sound, and a picture of 4 tokens, before what is made."""
    from diffusers.modular_pipelines.minimax_h3 import before_denoise
    from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference, MiniMaxH3VideoReference

    t, h, w = tiny_models.VIDEO
    empty = torch.zeros(0)  # only of what kind they are is read
    references = [MiniMaxH3VideoReference(frames=empty, audio=empty), MiniMaxH3ImageReference(image=empty)]
    made = before_denoise.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(TEXT, dtype=torch.long),
        references,
        [torch.zeros(1, 2, t, 2 * h, 2 * w), torch.zeros(1, 2, 1, 4, 4)],
        [torch.zeros(AUDIO, 4)],
        t,
        2 * h,
        2 * w,
        AUDIO // 2,
        (1, 2, 2),
        2,
        2,
        0,
    )
    return h3_forward(*made[:-1])


def h3_forward(
    position_ids: torch.Tensor,
    token_tags: torch.Tensor,
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    conditions: int,
) -> dict[str, Any]:
    rows = torch.zeros(len(position_ids), dtype=torch.long)
    rows[audio], rows[video[:conditions]] = 1, 2
    return {
        "hidden_states": noise(1, len(video), 8),
        "audio_hidden_states": noise(1, len(audio), 4),
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


def kandinsky6(head_dim: int, visual_cond: bool = False) -> torch.nn.Module:
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
            visual_cond=visual_cond,
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


def cosmos3(head_dim: int) -> torch.nn.Module:
    return diffusers.Cosmos3OmniTransformer(
        head_dim=head_dim,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rope_axes_dim=[head_dim // 4, head_dim // 8, head_dim // 8],
        sound_dim=4,
        sound_gen=True,
        vocab_size=32,
    )


def cosmos3_inputs(model: Any) -> dict[str, Any]:
    """Text, a video of which the first frame is given, and its sound."""
    t, h, w = tiny_models.VIDEO
    video, frames = torch.arange(TEXT, TEXT + t * h * w), torch.arange(1, t)
    sound = torch.arange(TEXT + t * h * w, TEXT + t * h * w + AUDIO)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(TEXT + t * h * w + AUDIO).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": TEXT + t * h * w + AUDIO,
        "vision_tokens": [noise(1, 4, t, 2 * h, 2 * w)],
        "vision_token_shapes": [(t, h, w)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video[h * w :],
        "vision_timesteps": torch.full(((t - 1) * h * w,), 500.0),
        "vision_noisy_frame_indexes": [frames],
        "sound_tokens": [noise(4, AUDIO)],
        "sound_token_shapes": [(AUDIO, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.full((AUDIO,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(AUDIO)],
    }


# --- LTX-2.3 and 2.5: gates, modulated cross-attention, perturbed attention; keyframes behind the video


def ltx23(head_dim: int, **overrides: Any) -> torch.nn.Module:
    later = {
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "perturbed_attn": True,
        "use_prompt_embeddings": False,
        "rope_type": "split",
    }
    return tiny_models.ltx2(head_dim, **later, **overrides)


def ltx23_inputs(model: Any) -> dict[str, Any]:
    """Guidance by perturbed attention in the second block, for the second sample."""
    inputs = tiny_models.ltx2_inputs(model)
    width = model.config.cross_attention_dim
    return {
        **inputs,
        "encoder_hidden_states": noise(BATCH, TEXT, width),
        "audio_encoder_hidden_states": noise(BATCH, TEXT, model.config.audio_cross_attention_dim),
        "sigma": torch.full((BATCH,), 500.0),
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([1.0, 0.0]),
    }


def ltx25(head_dim: int) -> torch.nn.Module:
    return ltx23(head_dim, use_keyframes_abs_pos_embedding=True, ff_bias=False, audio_ff_bias=False)


def ltx25_inputs(model: Any) -> dict[str, Any]:
    """A keyframe of 48 tokens behind the video, as the pipeline with conditions appends it."""
    inputs = ltx23_inputs(model)
    t, h, w = tiny_models.VIDEO
    coords = model.rope.prepare_video_coords(BATCH, t, h, w, "cpu", fps=24.0)
    frame = coords[:, :, -h * w :] + 1
    marks = torch.zeros(BATCH, t * h * w + h * w, 1)
    marks[:, t * h * w :] = 1
    return {
        **inputs,
        "hidden_states": noise(BATCH, t * h * w + h * w, 4),
        "video_coords": torch.cat([coords, frame], dim=2),
        "video_keyframes_mask": marks,
    }
