"""Transformers of 2026, at the default size of their diffusers pipeline unless said.

The sizes are those of the diffusers classes' defaults where the comment names no other source.
"""

import math
from typing import Any

from .architecture import Grid, Make, Model
from .shapes import Shape

_SOUND = 208  # latents of five seconds of sound; of LTX-2 and Kandinsky 6, which attend to them by themselves
_TIME = 500


def _minimax_h3_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    """Text, two channels of sound, as much as text, and video: the order of the modular pipeline."""
    import torch
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    (t, h, w), c, text = grid, model.config, model.shape.text // 2
    positions, tags, video, sound, words, _, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(text, dtype=torch.long), t, 2 * h, 2 * w, text // 2, (1, 2, 2), 2, 2, 0
    )
    latents = make(1, len(video), 4 * c["in_channels"])
    rows = torch.zeros(len(positions), dtype=torch.long)
    rows[sound] = 1
    places = {
        "timestep_indices": rows,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": words,
    }
    return {
        "hidden_states": latents,
        "audio_hidden_states": make(1, len(sound), c["audio_in_channels"]),
        "encoder_hidden_states": make(1, text, c["text_dim"]),
        "timestep": torch.tensor([0.3, 0.5], device=latents.device),
        **{name: each.to(latents.device) for name, each in places.items()},
    }


def _ltx2_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    import torch

    t, h, w = grid
    c = model.arguments(1)
    video = make(model.batch, math.prod(grid), c["in_channels"])
    times = torch.full((model.batch,), _TIME).to(video)
    return {
        "hidden_states": video,
        "audio_hidden_states": make(model.batch, _SOUND, c["audio_in_channels"]),
        "encoder_hidden_states": make(model.batch, _LTX_TEXT, c["cross_attention_dim"]),
        "audio_encoder_hidden_states": make(model.batch, _LTX_TEXT, c["audio_cross_attention_dim"]),
        "timestep": times[:, None],
        "sigma": times,
        "num_frames": t,
        "height": h,
        "width": w,
        "audio_num_frames": _SOUND,
    }


def _ltx2_heads(shape: Shape) -> dict[str, Any]:
    """Of the sound, too: as many, half as large."""
    return {
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.head_dim,
        "cross_attention_dim": shape.heads * shape.head_dim,
        "audio_num_attention_heads": shape.heads,
        "audio_attention_head_dim": shape.head_dim // 2,
        "audio_cross_attention_dim": shape.heads * shape.head_dim // 2,
    }


def _kandinsky6_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    """Video with the channels of a condition, and its mask."""
    import torch

    t, h, w = grid
    c = model.config
    video = make(model.batch, t, 2 * h, 2 * w, 2 * c["in_visual_dim"] + 1)
    return {
        "hidden_states": video,
        "audio_hidden_states": make(model.batch, _SOUND, c["in_audio_dim"]),
        "encoder_hidden_states": make(model.batch, 256, c["in_text_dim"]),
        "pooled_projections": make(model.batch, c["in_text_dim2"]),
        "timestep": torch.full((model.batch,), _TIME).to(video),
    }


def _kandinsky6_heads(shape: Shape) -> dict[str, Any]:
    """Whose size the axes of its rotary positions say."""
    return {"model_dim": shape.heads * shape.head_dim}


def _cosmos3_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    """Text, then a video that is all made."""
    import torch

    (t, h, w), text, c = grid, model.shape.text, model.config
    latents = make(1, c["latent_channel"], t, 2 * h, 2 * w)
    words = torch.arange(text, device=latents.device)
    video = torch.arange(text, text + math.prod(grid), device=latents.device)
    places = torch.cartesian_prod(*(torch.arange(side, device=latents.device) for side in grid)).T + text
    return {
        "input_ids": words % c["vocab_size"],
        "text_indexes": words,
        "position_ids": torch.cat([words.expand(3, -1), places], dim=1),
        "und_len": text,
        "sequence_length": text + len(video),
        "vision_tokens": [latents],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((len(video),), _TIME).to(latents),
        "vision_noisy_frame_indexes": [torch.arange(t, device=latents.device)],
    }


def _cosmos3_heads(shape: Shape) -> dict[str, Any]:
    return {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.heads * shape.head_dim,
    }


def _motif_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    import torch

    t, h, w = grid
    c = model.config
    video = make(model.batch, c["in_channels"], t, 2 * h, 2 * w)
    return {
        "hidden_states": video,
        "timestep": torch.full((model.batch,), _TIME, device=video.device),
        "encoder_hidden_states": make(model.batch, model.shape.text, c["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(model.batch, model.shape.text, dtype=torch.bool, device=video.device),
    }


_LTX_TEXT = 1024  # cross-attention only
_H3_WIDTHS = {"hidden_size": 5376, "ffn_dim": 14336, "text_dim": 5120, "time_embed_hidden_dim": 5376}
_KANDINSKY_WIDTHS = {"in_text_dim": 3584, "in_text_dim2": 768, "ff_dim": 16384, "time_dim": 1024, "num_text_blocks": 4}
_LTX25: dict[str, bool | str] = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
}
_LTX25 |= {"use_prompt_embeddings": False, "rope_type": "split", "ff_bias": False}

_MOTIF = {"enable_text_cross_attention_dual": True, "num_decoder_layers": 1}  # one: a few layers have some of each

LATER_MODELS = (
    Model(  # MiniMaxAI/MiniMax-H3, 768x1344, 124 frames, with sound; guidance is a second call
        name="minimax-h3",
        transformer="MiniMaxH3Transformer3DModel",
        config={"in_channels": 24, "audio_in_channels": 32, "num_refiner_layers": 2, **_H3_WIDTHS},
        shape=Shape(name="minimax-h3", grid=(37, 24, 42), text=4 * 207, text_first=True, heads=56),
        stride=(0, 32, 32),
        units=50,
        inputs=_minimax_h3_inputs,
        preset="video",
        calls=2,
    ),
    Model(  # Lightricks/LTX-2.5, 1088x1920, 121 frames, with sound: the fields that the checkpoint's header has
        name="ltx-2.5",
        transformer="LTX2VideoTransformer3DModel",
        config={**_LTX25, "use_keyframes_abs_pos_embedding": True, "in_channels": 128, "audio_in_channels": 128},
        shape=Shape(name="ltx-2.5", grid=(16, 34, 60), heads=32),
        stride=(8, 32, 32),
        heads=_ltx2_heads,
        units=48,
        inputs=_ltx2_inputs,
        preset="video",
        calls=2,
        steps=30,
    ),
    Model(  # Kandinsky 6, 512x768, 121 frames, with sound; guidance is a second call
        name="kandinsky-6",
        transformer="Kandinsky6Transformer3DModel",
        config={"in_visual_dim": 16, "in_audio_dim": 20, **_KANDINSKY_WIDTHS},
        shape=Shape(name="kandinsky-6", grid=(31, 32, 48), heads=32),
        heads=_kandinsky6_heads,
        unit={"num_visual_blocks": 1},
        units=60,
        inputs=_kandinsky6_inputs,
        preset="video",
        calls=2,
    ),
    Model(  # nvidia/Cosmos3-Nano, 720x1280, 189 frames; guidance is a second call
        name="cosmos-3",
        transformer="Cosmos3OmniTransformer",
        config={"latent_channel": 48, "intermediate_size": 12288, "vocab_size": 151936},
        shape=Shape(name="cosmos-3", grid=(48, 23, 40), text=512, text_first=True, heads=32, kv_heads=8),
        stride=(4, 32, 32),
        heads=_cosmos3_heads,
        unit={"num_hidden_layers": 1},
        units=36,
        inputs=_cosmos3_inputs,
        preset="video",
        calls=2,
        steps=35,
    ),
    Model(  # Motif-Technologies/Motif-Video-2B, 736x1280, 121 frames; guidance is a second call
        name="motif-video",
        transformer="MotifVideoTransformer3DModel",
        config={"in_channels": 33, "text_embed_dim": 2560, **_MOTIF},
        shape=Shape(name="motif-video", grid=(31, 46, 80), text=512, heads=12),
        unit={"num_layers": 1, "num_single_layers": 2},
        units=12,
        inputs=_motif_inputs,
        preset="video",
        calls=2,
    ),
)
