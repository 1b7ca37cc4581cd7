"""The transformers of the paper and its published code.

Fields that a published config.json shares with the defaults of the diffusers class are left out of `config`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .architecture import Grid, Make, Model
from .shapes import SHAPES, Shape

if TYPE_CHECKING:  # options are read and help is shown without it
    import torch


def _inputs(model: Model, latents: "torch.Tensor", make: Make) -> dict[str, Any]:
    """What all forwards take, and what `config` says that one takes, too. latents: [batch, ...]."""
    import torch

    c = model.config
    width = next(c[name] for name in ("text_embed_dim", "text_dim", "joint_attention_dim") if name in c)
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": make(model.batch, model.shape.text or _WAN_TEXT, width),
        "timestep": torch.full((model.batch,), 500, device=latents.device),
    }
    if "pooled_projection_dim" in c:
        inputs["pooled_projections"] = make(model.batch, c["pooled_projection_dim"])
        inputs["guidance"] = torch.full((model.batch,), 6000).to(latents)
    if "image_dim" in c:
        inputs["encoder_hidden_states_image"] = make(model.batch, _CLIP_TOKENS, c["image_dim"])
    return inputs


def _video(model: Model, grid: Grid, make: Make) -> "torch.Tensor":
    t, h, w = grid
    patch = model.config.get("patch_size", 2)  # Wan has one a side, frames first
    side = patch if isinstance(patch, int) else patch[-1]
    return make(model.batch, model.config["in_channels"], t, side * h, side * w)


def _hunyuan_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    import torch

    valid = torch.ones(model.batch, model.shape.text, dtype=torch.bool)
    inputs = _inputs(model, _video(model, grid, make), make)
    return inputs | {"encoder_attention_mask": valid.to(inputs["timestep"].device)}


def _wan_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    return _inputs(model, _video(model, grid, make), make)


def _wan_timestep_a_token(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    inputs = _wan_inputs(model, grid, make)
    return inputs | {"timestep": inputs["timestep"][:, None].repeat(1, math.prod(grid))}


def _cogvideox_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = grid
    c, p = model.config, 2
    latents = make(model.batch, t * c["patch_size_t"], c["in_channels"], h * p, w * p)
    rotary = get_3d_rotary_pos_embed(
        embed_dim=model.shape.head_dim,
        crops_coords=None,
        grid_size=(h, w),
        temporal_size=t,
        grid_type="slice",
        max_size=(c["sample_height"] // p, c["sample_width"] // p),
        device=latents.device,
    )
    return _inputs(model, latents, make) | {"image_rotary_emb": rotary}


def _flux_inputs(model: Model, grid: Grid, make: Make) -> dict[str, Any]:
    import torch

    image = make(model.batch, math.prod(grid), model.config["in_channels"])
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # [tokens, 3]
    inputs = _inputs(model, image, make) | {
        "timestep": torch.full((model.batch,), 0.5).to(image),
        "guidance": torch.full((model.batch,), 4.0).to(image),  # 4000 is exact in bfloat16
    }
    return inputs | {"img_ids": places.to(image), "txt_ids": torch.zeros(model.shape.text, 3).to(image)}


_WAN_TEXT, _CLIP_TOKENS = 512, 257  # cross-attention only: not part of the self-attention's sequence
_GUIDED = {"pooled_projection_dim": 768, "guidance_embeds": True}
_WAN: Mapping[str, Any] = {"patch_size": (1, 2, 2), "text_dim": 4096, "in_channels": 16, "ffn_dim": 13824}
_WAN_I2V = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}
_COGVIDEOX = {"in_channels": 16, "text_embed_dim": 4096, "patch_size_t": 2, "patch_bias": False}
_COGVIDEOX |= {"sample_height": 300, "sample_width": 300, "sample_frames": 81}

_WAN_T2V = Model(  # Wan-AI/Wan2.1-T2V-14B-Diffusers, 720x1280, 81 frames; guidance is a second call
    name="wan2.1-14b",
    transformer="WanTransformer3DModel",
    config=_WAN,
    shape=SHAPES["wan-14b"],
    units=40,
    inputs=_wan_inputs,
    preset="wan2.1-t2v",
    calls=2,
    paper={0.797: 1.80},
    paper_composed=4.61,
)
PAPER_MODELS = (
    Model(  # hunyuanvideo-community/HunyuanVideo, 720x1280, 128 frames; guidance is embedded
        name="hunyuan-video",
        transformer="HunyuanVideoTransformer3DModel",
        config={"in_channels": 16, "num_refiner_layers": 2, "text_embed_dim": 4096, **_GUIDED},
        shape=SHAPES["hunyuan-video"],
        unit={"num_layers": 1, "num_single_layers": 2},
        units=20,
        inputs=_hunyuan_inputs,
        preset="hunyuan-video-t2v",
        paper={0.797: 2.50, 0.8895: 3.33},
        paper_composed=5.24,
    ),
    _WAN_T2V,
    replace(  # Wan-AI/Wan2.1-I2V-14B-720P-Diffusers: image latents are channels, its CLIP tokens are attended to
        _WAN_T2V,
        name="wan2.1-14b-i2v",
        config={**_WAN, **_WAN_I2V},
        preset="wan2.1-i2v",
        paper={0.839: 2.08},
        paper_composed=None,
    ),
    replace(  # Wan-AI/Wan2.2-TI2V-5B-Diffusers, 704x1280, 121 frames (VAE 4x16x16); every token has a timestep
        _WAN_T2V,
        name="wan2.2-ti2v-5b",
        config={**_WAN, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336},
        shape=Shape(name="wan2.2-ti2v-5b", grid=(31, 22, 40), heads=24),
        stride=(4, 32, 32),
        units=30,
        inputs=_wan_timestep_a_token,
        preset="wan2.2-ti2v-5b",
        paper={},
        paper_composed=None,
    ),
    Model(  # zai-org/CogVideoX1.5-5B, 768x1360, 81 frames; guidance is a second sample of the batch
        name="cogvideox1.5-5b",
        transformer="CogVideoXTransformer3DModel",
        config={**_COGVIDEOX, "use_rotary_positional_embeddings": True},
        shape=SHAPES["cogvideox1.5"],
        units=42,
        inputs=_cogvideox_inputs,
        preset="cogvideox1.5-t2v",
        batch=2,
    ),
    Model(  # black-forest-labs/FLUX.1-dev, 4096x4096, without the ControlNet; guidance is embedded
        name="flux.1-dev",
        transformer="FluxTransformer2DModel",
        config={"in_channels": 64, "joint_attention_dim": 4096, **_GUIDED},
        shape=SHAPES["flux-4096"],
        stride=(1, 16, 16),
        unit={"num_layers": 1, "num_single_layers": 2},
        units=19,
        inputs=_flux_inputs,
        preset="flux.1-dev-4096",
        paper_composed=8.97,
    ),
)
