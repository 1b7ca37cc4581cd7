"""The supported transformer classes and the ways they are used, each with what enable() must do to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiny_models import (
    TEXT,
    animate,
    animate_inputs,
    cogvideox,
    cogvideox15,
    cogvideox_inputs,
    flux,
    flux2,
    flux2_inputs,
    flux_inputs,
    hunyuan,
    hunyuan15,
    hunyuan15_inputs,
    hunyuan_inputs,
    ltx,
    ltx2,
    ltx2_inputs,
    ltx_coordinates,
    ltx_inputs,
    qwen,
    qwen_inputs,
    skyreels,
    skyreels_forcing_inputs,
    vace,
    vace_inputs,
    wan,
    wan_image_inputs,
    wan_inputs,
    wan_token_timesteps,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to use a transformer class.

    sparse     names of the processors that are exchanged, as a regular expression; calls: how many there are
    head_dims  a tiny one, and one the kernels are made for
    preset     found from the transformer alone; None: the user must say
    text       tokens beside the video or image
    """

    make: Callable[[int], torch.nn.Module]
    inputs: Callable[[torch.nn.Module], dict[str, Any]]
    sparse: str
    calls: int
    head_dims: tuple[int, int]
    preset: str | None
    text: int = 0


SELF = r"blocks\.\d+\.attn1\.processor"
JOINT = r"(single_)?transformer_blocks\.\d+\.attn\.processor"
COGVIDEOX = r"transformer_blocks\.\d+\.attn1\.processor"
CASES: dict[str, Case] = {}


def case(name: str, make: Any, inputs: Any, sparse: str, calls: int, preset: str | None, text: int = 0, **more: Any):
    CASES[name] = Case(
        make=make,
        inputs=inputs,
        sparse=sparse,
        calls=calls,
        preset=preset,
        text=text,
        head_dims=more.get("head_dims", (16, 128)),
    )


case("Wan 2.1 T2V", wan, wan_inputs, SELF, 2, "wan2.1-t2v")
case(
    "Wan 2.1 I2V",
    lambda d: wan(d, in_channels=36, image_dim=4, added_kv_proj_dim=2 * d),
    wan_image_inputs,
    SELF,
    2,
    "wan2.1-i2v",
)
case("Wan 2.2 I2V", lambda d: wan(d, in_channels=36), wan_inputs, SELF, 2, "wan2.2-i2v-a14b")
case(
    "Wan 2.2 TI2V",
    lambda d: wan(d, in_channels=48, out_channels=48),
    wan_token_timesteps,
    SELF,
    2,
    "wan2.2-ti2v-5b",
)
case("Wan VACE", vace, vace_inputs, r"(vace_)?blocks\.\d+\.attn1\.processor", 4, "wan2.1-t2v")
case("Wan Animate", animate, animate_inputs, SELF, 2, "wan2.1-i2v")
case("SkyReels-V2 T2V", skyreels, wan_inputs, SELF, 2, "wan2.1-t2v")
case(
    "SkyReels-V2 diffusion forcing",
    lambda d: skyreels(d, inject_sample_info=True),
    skyreels_forcing_inputs,
    SELF,
    2,
    "wan2.1-t2v",
)
case("HunyuanVideo T2V", hunyuan, hunyuan_inputs, JOINT, 2, "hunyuan-video-t2v", TEXT)
case(
    "HunyuanVideo I2V, latents concatenated",
    lambda d: hunyuan(d, in_channels=9, image_condition_type="latent_concat", guidance_embeds=False),
    hunyuan_inputs,
    JOINT,
    2,
    "hunyuan-video-t2v",
    TEXT,
)
case(
    "HunyuanVideo I2V, token replaced",
    lambda d: hunyuan(d, image_condition_type="token_replace", guidance_embeds=True),
    hunyuan_inputs,
    JOINT,
    2,
    "hunyuan-video-t2v",
    TEXT,
)
case("HunyuanVideo 1.5 T2V", hunyuan15, hunyuan15_inputs, JOINT, 2, "hunyuan-video-t2v", 15)
case(
    "HunyuanVideo 1.5 I2V",
    hunyuan15,
    lambda model: hunyuan15_inputs(model, image=True),
    JOINT,
    2,
    "hunyuan-video-t2v",
    15,
)
case(
    "CogVideoX 1.0",
    lambda d: cogvideox(d, use_rotary_positional_embeddings=False),
    cogvideox_inputs,
    COGVIDEOX,
    2,
    "cogvideox1.5-t2v",
    TEXT,
    head_dims=(16, 64),
)
case("CogVideoX 1.5 T2V", cogvideox15, cogvideox_inputs, COGVIDEOX, 2, "cogvideox1.5-t2v", TEXT, head_dims=(16, 64))
case(
    "CogVideoX 1.5 I2V",
    lambda d: cogvideox15(d, in_channels=8, ofs_embed_dim=8),
    cogvideox_inputs,
    COGVIDEOX,
    2,
    "cogvideox1.5-i2v",
    TEXT,
    head_dims=(16, 64),
)
case("Flux.1", flux, flux_inputs, JOINT, 3, "flux.1-dev-4096", TEXT)
case("Flux.2", flux2, flux2_inputs, JOINT, 3, None, TEXT)
case("Qwen-Image", qwen, qwen_inputs, JOINT, 2, None, TEXT)
case("LTX-Video", ltx, ltx_inputs, COGVIDEOX, 2, None, head_dims=(16, 64))
case("LTX-2", ltx2, ltx2_inputs, COGVIDEOX, 2, None)
case("LTX-Video, conditions", ltx, ltx_coordinates, COGVIDEOX, 2, None, head_dims=(16, 64))


def build(name: str, head_dim: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a case with the same random weights every time, and its forward arguments."""
    torch.manual_seed(0)
    model = CASES[name].make(head_dim).eval()
    return model, CASES[name].inputs(model)
