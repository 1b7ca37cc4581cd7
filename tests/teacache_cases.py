"""Tiny transformers that TeaCache knows, and walks through their denoising steps."""

import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel

import tiny
from rectified_spaattn.pipelines.teacache.models import CACHED_MODELS

HUGE = 1e9
"""A threshold that skips every step that may be skipped."""


def flux_transformer(**overrides):
    torch.manual_seed(0)
    settings = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**{**settings, **overrides}).eval()


def flux_inputs():
    torch.manual_seed(1)
    rows = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), dim=-1).reshape(-1, 2)
    return {
        "hidden_states": torch.randn(1, 36, 4),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.cat([torch.zeros(36, 1), rows], dim=1),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5]),
    }


def cogvideox_transformer(**overrides):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "patch_size_t": 2,
        "patch_bias": False,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 12,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**{**settings, **overrides}).eval()


def cogvideox_inputs():
    torch.manual_seed(1)
    angles = torch.randn(2 * 4 * 4, 16)
    return {
        "hidden_states": torch.randn(2, 4, 4, 8, 8),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 12, 16),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def wan_ti2v_inputs():
    inputs = tiny.wan_inputs()
    timestep = torch.full((2, 3 * 8 * 8), 500)
    timestep[:, :64] = 0  # the first frame is given
    return {**inputs, "timestep": timestep}


MODELS = {
    "hunyuan": (tiny.hunyuan_transformer, tiny.hunyuan_inputs),
    "hunyuan-i2v": (lambda: tiny.hunyuan_transformer(image_condition_type="token_replace"), tiny.hunyuan_inputs),
    "wan": (tiny.wan_transformer, tiny.wan_inputs),
    "wan-ti2v": (tiny.wan_transformer, wan_ti2v_inputs),
    "cogvideox": (cogvideox_transformer, cogvideox_inputs),
    "flux": (flux_transformer, flux_inputs),
}
LISTS = {"hunyuan": 2, "hunyuan-i2v": 2, "flux": 2}


def blocks_of(model):
    return [block for name in CACHED_MODELS[type(model).__name__].blocks for block in getattr(model, name)]


class Calls:
    """Counts the forwards of blocks, a list a block."""

    def __init__(self, model):
        self.counts = [0] * len(blocks_of(model))
        self.hooks = [block.register_forward_hook(self._counter(i)) for i, block in enumerate(blocks_of(model))]

    def _counter(self, i):
        def count(*_):
            self.counts[i] += 1

        return count

    def take(self):
        counts, self.counts = self.counts, [0] * len(self.counts)
        assert len(set(counts)) == 1, counts
        return counts[0]


def at_step(inputs, step, total, pace=0.1):
    """Inputs of one denoising step: the timestep falls, and the latents drift."""
    timestep = inputs["timestep"]
    fraction = 1 - step / total
    scaled = timestep * 2 * fraction if timestep.is_floating_point() else (timestep * 2 * fraction).long()
    drift = pace * step * torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
    latents = inputs["hidden_states"] + drift.to(inputs["hidden_states"].device)
    return {**inputs, "timestep": scaled, "hidden_states": latents}


def forward(model, inputs, branch=None):
    with torch.no_grad():
        if branch is None:
            return model(**inputs).sample
        with model.cache_context(branch):
            return model(**inputs).sample


def walk(model, inputs, handle, total=8, branch=None, pace=0.1):
    outputs = []
    for step in range(total):
        if handle is not None:
            handle.set_step(step, total)
        outputs.append(forward(model, at_step(inputs, step, total, pace), branch).clone())  # as CUDA graphs need
    return torch.stack(outputs)


def first_steps(kind):
    return 5 if kind.startswith("wan") else 1
