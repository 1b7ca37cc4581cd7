"""More of tiny_pipelines: references, embeddings of other lengths, a sparse attention of the model's own."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tiny_image_models import z_image
from tiny_models import IMAGE, VIDEO, noise
from tiny_pipelines import PIPELINES, Pipeline, flux, image, picture, quiet
from tiny_video_models import kandinsky5

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
