"""Real diffusers pipelines with tiny random transformers and VAEs; text and image embeddings come ready-made."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tiny_models
from tiny_models import IMAGE, TEXT, VIDEO, masked, noise


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """make: the pipeline. arguments: of its call, steps and output apart. calls: self-attention calls in a step."""

    make: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    calls: int
    preset: str
    grid: tuple[int, int, int] | None


PIPELINES: dict[str, Pipeline] = {}


def run(pipeline: Any, arguments: dict[str, Any], steps: int = 2) -> torch.Tensor:
    """Latents [B, ...] of one call."""
    settings = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    latents: torch.Tensor = pipeline(**arguments, **settings, generator=torch.Generator().manual_seed(3))[0]
    return latents


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video(**sizes: int) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, 16),
        "negative_prompt_embeds": -noise(1, TEXT, 16),
        "height": 96,
        "width": 128,
        **sizes,
    }


def picture(width: int, height: int) -> Image.Image:
    pixels = torch.arange(width * height * 3).view(height, width, 3) * 37 % 256
    return Image.fromarray(pixels.to(torch.uint8).numpy())


# --- Wan: 4x8x8 in the VAE, patches of 2x2


def wan(kind: Any, *transformers: Any, **modules: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    made = [make().eval() for make in transformers]
    if len(made) > 1:
        modules |= {"transformer_2": made[1], "boundary_ratio": 0.9}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    if issubclass(kind, diffusers.SkyReelsV2Pipeline | diffusers.SkyReelsV2DiffusionForcingPipeline):
        scheduler = diffusers.UniPCMultistepScheduler(
            flow_shift=7.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    plain = {"tokenizer": None, "text_encoder": None, "vae": vae.eval(), "scheduler": scheduler}
    return quiet(kind(**plain, transformer=made[0], **modules))


def wan_t2v() -> Any:
    return tiny_models.wan(16)


def wan_i2v(**config: Any) -> Any:
    return tiny_models.wan(16, in_channels=36, **config)


def wan_image(**more: Any) -> dict[str, Any]:
    return {**video(num_frames=13), "image": picture(128, 96), **more}


def image_encoder() -> dict[str, Any]:
    """A CLIP that makes 5 tokens of size 4."""
    config = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    torch.manual_seed(2)
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(crop_size=32, size=32),
    }


PIPELINES["Wan 2.1 I2V"] = Pipeline(
    make=lambda: wan(
        diffusers.WanImageToVideoPipeline, lambda: wan_i2v(image_dim=4, added_kv_proj_dim=32), **image_encoder()
    ),
    arguments=lambda: wan_image(prompt_embeds=noise(1, 512, 16), negative_prompt_embeds=-noise(1, 512, 16)),
    calls=4,
    preset="wan2.1-i2v",
    grid=VIDEO,
)
PIPELINES["Wan 2.2 I2V-A14B"] = Pipeline(
    make=lambda: wan(diffusers.WanImageToVideoPipeline, wan_i2v, wan_i2v),
    arguments=wan_image,
    calls=4,
    preset="wan2.2-i2v-a14b",
    grid=VIDEO,
)
PIPELINES["Wan 2.2 T2V-A14B"] = Pipeline(
    make=lambda: wan(diffusers.WanPipeline, wan_t2v, wan_t2v),
    arguments=lambda: video(num_frames=13),
    calls=4,
    preset="wan2.2-t2v-a14b",
    grid=VIDEO,
)
PIPELINES["Wan 2.2 TI2V-5B, text"] = Pipeline(
    make=lambda: wan(diffusers.WanPipeline, wan_t2v, expand_timesteps=True),
    arguments=lambda: video(num_frames=13),
    calls=4,
    preset="wan2.2-ti2v-5b",
    grid=VIDEO,
)
PIPELINES["Wan 2.2 TI2V-5B, image"] = Pipeline(
    make=lambda: wan(diffusers.WanImageToVideoPipeline, wan_t2v, expand_timesteps=True),
    arguments=wan_image,
    calls=4,
    preset="wan2.2-ti2v-5b",
    grid=VIDEO,
)


# --- CogVideoX 1.5: 4x8x8 in the VAE, patches of 2x2x2, guidance in one batch


def cogvideox(kind: Any, **transformer: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return quiet(
        kind(
            tokenizer=None,
            text_encoder=None,
            vae=vae.eval(),
            transformer=tiny_models.cogvideox15(16, **transformer).eval(),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )
    )


PIPELINES["CogVideoX 1.5 T2V"] = Pipeline(
    make=lambda: cogvideox(diffusers.CogVideoXPipeline),
    arguments=lambda: video(num_frames=25),  # 7 frames of latents, filled up to 8
    calls=2,
    preset="cogvideox1.5-t2v",
    grid=VIDEO,
)
PIPELINES["CogVideoX 1.5 I2V"] = Pipeline(
    make=lambda: cogvideox(diffusers.CogVideoXImageToVideoPipeline, in_channels=8, ofs_embed_dim=8),
    arguments=lambda: {**video(num_frames=25), "image": picture(128, 96)},
    calls=2,
    preset="cogvideox1.5-i2v",
    grid=VIDEO,
)


# --- Flux.1: the tiny VAE keeps the size, latents are packed 2x2


def flux(kind: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    return quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny_models.flux(16).eval(),
            **more,
        )
    )


def controlnet() -> Any:
    torch.manual_seed(1)
    model = diffusers.FluxControlNetModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=tiny_models.axes(16),
    )
    for parameter in model.parameters():  # its outputs start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def image() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, 16),
        "pooled_prompt_embeds": noise(1, 8),
        "height": 2 * IMAGE[1],
        "width": 2 * IMAGE[2],
    }


PIPELINES["Flux.1"] = Pipeline(
    make=lambda: flux(diffusers.FluxPipeline),
    arguments=image,
    calls=3,
    preset="flux.1-dev-4096",
    grid=IMAGE,
)
PIPELINES["Flux.1 with a ControlNet"] = Pipeline(
    make=lambda: flux(diffusers.FluxControlNetPipeline, controlnet=controlnet()),
    arguments=lambda: {**image(), "control_image": picture(24, 32)},
    calls=3,
    preset="flux.1-dev-4096",
    grid=IMAGE,
)


# --- models of the same families, and others


def hunyuan15() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    pipeline = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_models.hunyuan15(16, in_channels=9).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipeline.vision_num_semantic_tokens = 3  # 729 empty places for image tokens would be most of the sequence
    return quiet(pipeline)


def hunyuan15_arguments() -> dict[str, Any]:
    words = {"embeds": noise(1, 7, 16), "embeds_mask": masked(5, total=7)}
    glyphs = {"embeds_2": noise(1, 5, 8), "embeds_mask_2": masked(0, total=5)}
    prompts = {
        f"{kind}_{name}": value for kind in ("prompt", "negative_prompt") for name, value in (words | glyphs).items()
    }
    _, h, w = VIDEO
    return {**prompts, "height": 4 * h, "width": 4 * w, "num_frames": 13}


PIPELINES["HunyuanVideo 1.5 T2V"] = Pipeline(
    make=hunyuan15, arguments=hunyuan15_arguments, calls=4, preset="hunyuan-video-t2v", grid=VIDEO
)


PIPELINES["Wan VACE"] = Pipeline(
    make=lambda: wan(diffusers.WanVACEPipeline, lambda: tiny_models.vace(16, vace_in_channels=96)),
    arguments=lambda: video(num_frames=13),
    calls=8,
    preset="wan2.1-t2v",
    grid=VIDEO,
)
PIPELINES["SkyReels-V2 T2V"] = Pipeline(
    make=lambda: wan(diffusers.SkyReelsV2Pipeline, lambda: tiny_models.skyreels(16)),
    arguments=lambda: video(num_frames=13),
    calls=4,
    preset="wan2.1-t2v",
    grid=VIDEO,
)
PIPELINES["SkyReels-V2 diffusion forcing"] = Pipeline(
    make=lambda: wan(
        diffusers.SkyReelsV2DiffusionForcingPipeline, lambda: tiny_models.skyreels(16, inject_sample_info=True)
    ),
    arguments=lambda: {**video(num_frames=13), "prompt": None},
    calls=4,
    preset="wan2.1-i2v",
    grid=VIDEO,
)


def ltx(kind: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    return quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny_models.ltx(16).eval(),
        )
    )


def ltx_arguments() -> dict[str, Any]:
    _, h, w = VIDEO
    masks = {"prompt_attention_mask": masked(9), "negative_prompt_attention_mask": masked(4)}
    return {**video(height=32 * h, width=32 * w, num_frames=25), **masks}


for name, kind in (("text", diffusers.LTXPipeline), ("conditions", diffusers.LTXConditionPipeline)):
    PIPELINES[f"LTX-Video, {name}"] = Pipeline(
        make=functools.partial(ltx, kind), arguments=ltx_arguments, calls=2, preset="video", grid=VIDEO
    )


def qwen() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return quiet(
        diffusers.QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny_models.qwen(16).eval(),
        )
    )


def qwen_arguments() -> dict[str, Any]:
    _, h, w = IMAGE
    masks = {"prompt_embeds_mask": masked(9), "negative_prompt_embeds_mask": masked(4)}
    return {**video(height=16 * h, width=16 * w), **masks}


PIPELINES["Qwen-Image"] = Pipeline(make=qwen, arguments=qwen_arguments, calls=4, preset="image", grid=IMAGE)
