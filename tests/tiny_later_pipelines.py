"""More of tiny_pipelines: references, embeddings of other lengths, a sparse attention of the model's own."""

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from tiny_image_models import z_image
from tiny_joint_models import mochi, motif_video
from tiny_models import IMAGE, TEXT, VIDEO, masked, noise
from tiny_pipelines import PIPELINES, Pipeline, flux, image, picture, quiet
from tiny_video_models import cosmos3, kandinsky5, kandinsky6, ltx23

PIPELINES["Flux.1 Kontext"] = Pipeline(
    make=lambda: flux(diffusers.FluxKontextPipeline),
    arguments=lambda: {**image(), "image": picture(24, 32), "max_area": 24 * 32, "_auto_resize": False},
    calls=3,
    preset="flux.1-dev-4096",
    grid=None,
)


def z_image_pipeline() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, shift_factor=0.0
    )
    return quiet(
        diffusers.ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=z_image(16).eval(),
        )
    )


PIPELINES["Z-Image"] = Pipeline(
    make=z_image_pipeline,
    arguments=lambda: {
        "prompt_embeds": [noise(40, 16)],
        "negative_prompt_embeds": [noise(20, 16)],
        "height": 2 * IMAGE[1],
        "width": 2 * IMAGE[2],
    },
    calls=2,
    preset="image",
    grid=IMAGE,
)


def kandinsky5_pipeline() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return quiet(
        diffusers.Kandinsky5T2VPipeline(
            transformer=kandinsky5(16).eval(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )


def kandinsky5_arguments() -> dict[str, Any]:
    words = {"embeds_qwen": noise(1, 12, 16), "embeds_clip": noise(1, 8), "cu_seqlens": torch.tensor([0, 12])}
    prompts = {f"{kind}_{name}": each for kind in ("prompt", "negative_prompt") for name, each in words.items()}
    return {**prompts, "height": 16 * VIDEO[1], "width": 16 * VIDEO[2], "num_frames": 13}


PIPELINES["Kandinsky 5"] = Pipeline(
    make=kandinsky5_pipeline, arguments=kandinsky5_arguments, calls=4, preset="video", grid=VIDEO
)


def kandinsky6_pipeline() -> Any:
    """Without sound: its sampler needs another autoencoder and a vocoder."""
    torch.manual_seed(0)
    text = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    return quiet(
        diffusers.Kandinsky6TI2VAPipeline(
            transformer=kandinsky6(16, visual_cond=True).eval(),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            **text,
        )
    )


PIPELINES["Kandinsky 6"] = Pipeline(
    make=kandinsky6_pipeline,
    arguments=lambda: {
        **{f"{sign}prompt_embeds": noise(1, 12, 16) for sign in ("", "negative_")},
        **{f"{sign}pooled_prompt_embeds": noise(1, 8) for sign in ("", "negative_")},
        "height": 16 * VIDEO[1],
        "width": 16 * VIDEO[2],
        "num_frames": 13,
        "sample_audio": False,
    },
    calls=4,
    preset="video",
    grid=VIDEO,
)


def motif_pipeline() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return quiet(
        diffusers.MotifVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=motif_video(16, in_channels=33, out_channels=16, image_embed_dim=None).eval(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
    )


def masked_words() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, 16),
        "negative_prompt_embeds": -noise(1, TEXT, 16),
        "prompt_attention_mask": masked(9),
        "negative_prompt_attention_mask": masked(4),
    }


PIPELINES["Motif-Video"] = Pipeline(
    make=motif_pipeline,
    arguments=lambda: {**masked_words(), "height": 16 * VIDEO[1], "width": 16 * VIDEO[2], "num_frames": 13},
    calls=6,
    preset="video",
    grid=VIDEO,
)


def mochi_pipeline() -> Any:
    torch.manual_seed(0)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    return quiet(
        diffusers.MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), transformer=mochi(16).eval(), **parts
        )
    )


PIPELINES["Mochi"] = Pipeline(
    make=mochi_pipeline,
    arguments=lambda: {**masked_words(), "height": 16 * VIDEO[1], "width": 16 * VIDEO[2], "num_frames": 19},
    calls=2,
    preset="video",
    grid=VIDEO,
)


class Words:
    """In the place of a tokenizer: one number a word."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversations: list[dict[str, str]], **_: Any) -> Any:
        words = " ".join(each["content"] for each in conversations).split()
        return SimpleNamespace(input_ids=[3 + len(word) % 16 for word in words[:TEXT]])


def cosmos3_pipeline() -> Any:
    """Without sound, whose tokenizer is a model of its own."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return quiet(
        diffusers.Cosmos3OmniPipeline(
            transformer=cosmos3(16).eval(),
            text_tokenizer=Words(),
            vae=vae.eval(),
            scheduler=diffusers.UniPCMultistepScheduler(
                flow_shift=5.0, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            enable_safety_checker=False,
        )
    )


PIPELINES["Cosmos 3"] = Pipeline(
    make=cosmos3_pipeline,
    arguments=lambda: {
        "prompt": "a red fox in the snow",
        "height": 16 * VIDEO[1],
        "width": 16 * VIDEO[2],
        "num_frames": 13,
        "use_system_prompt": False,
    },
    calls=4,
    preset="video",
    grid=VIDEO,
)


def ltx23_pipeline() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1, 2), num_res_blocks=1, latent_channels=2, mel_bins=8, resolution=32
    )
    heads = {"num_attention_heads": 2, "num_layers": 1, "num_learnable_registers": None}
    sizes = {
        "video_connector": {**heads, "attention_head_dim": 16},
        "audio_connector": {**heads, "attention_head_dim": 8},
    }
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=32,
        audio_hidden_dim=16,
        **{f"{which}_{name}": size for which, each in sizes.items() for name, size in each.items()},
    )
    return quiet(
        diffusers.LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
            vae=vae.eval(),
            audio_vae=sound.eval(),
            text_encoder=None,
            tokenizer=None,
            connectors=connectors.eval(),
            transformer=ltx23(16).eval(),
            vocoder=None,
        )
    )


PIPELINES["LTX-2.3"] = Pipeline(
    make=ltx23_pipeline,
    arguments=lambda: {
        **masked_words(),
        **{f"{sign}prompt_embeds": noise(1, TEXT, 16, 3) for sign in ("", "negative_")},
        "height": 32 * VIDEO[1],
        "width": 32 * VIDEO[2],
        "num_frames": 25,
        "spatio_temporal_guidance_blocks": [1],
    },
    calls=2 + 1 + 2,  # guided: the perturbed pass leaves the second block out, the third isolates video and sound
    preset="video",
    grid=VIDEO,
)
