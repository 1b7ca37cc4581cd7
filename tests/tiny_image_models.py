"""Real diffusers image transformers with random weights, one or two layers, and what their forward takes.

As tiny_models: every image has the grid (1, 16, 12) in tokens, 12 blocks of 16.
"""

from typing import Any

import diffusers
import torch

import tiny_models
from tiny_models import BATCH, TEXT, axes, flux_inputs, image_ids, masked, noise
from tiny_video_models import HEADS, filled


def flux3(head_dim: int) -> torch.nn.Module:
    return diffusers.Flux3Transformer2DModel(
        **HEADS,
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head_dim,
        joint_attention_dim=16,
        timestep_channels=16,
        mlp_ratio=1.0,
        axes_dims_rope=(head_dim // 4,) * 4,
    )


def flux3_inputs(model: Any, reference: tuple[int, int] | None = None) -> dict[str, Any]:
    _, h, w = tiny_models.IMAGE
    inputs = {
        "hidden_states": noise(BATCH, h * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "timestep": torch.full((BATCH,), 0.5),
        "img_ids": image_ids(h, w, columns=4),
        "txt_ids": torch.zeros(TEXT, 4),
    }
    if reference is not None:
        ids = image_ids(*reference, columns=4, frame=10)
        inputs |= {"image_cond_hidden_states": noise(BATCH, len(ids), 4), "image_cond_ids": ids}
    return inputs


def longcat(head_dim: int) -> torch.nn.Module:
    return diffusers.LongCatImageTransformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head_dim,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=list(axes(head_dim)),
    )


def longcat_inputs(model: Any) -> dict[str, Any]:
    inputs = flux_inputs(model)
    return {name: value for name, value in inputs.items() if name != "pooled_projections"}


def ovis(head_dim: int) -> torch.nn.Module:
    return diffusers.OvisImageTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head_dim,
        joint_attention_dim=16,
        axes_dims_rope=axes(head_dim),
    )


def bria(head_dim: int, kind: Any = diffusers.BriaTransformer2DModel, **more: Any) -> torch.nn.Module:
    return kind(
        **HEADS,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head_dim,
        joint_attention_dim=16,
        axes_dims_rope=list(axes(head_dim)),
        **more,
    )


def bria_fibo(head_dim: int) -> torch.nn.Module:
    return bria(head_dim, diffusers.BriaFiboTransformer2DModel, text_encoder_dim=16)


def bria_fibo_inputs(model: Any) -> dict[str, Any]:
    """The pipeline passes a key mask where a prompt is shorter than another."""
    words = masked(12, 5)
    image = torch.ones(BATCH, 192, dtype=torch.bool)
    return {
        **longcat_inputs(model),
        "text_encoder_layers": [noise(BATCH, TEXT, 16), noise(BATCH, TEXT, 16) + 1],
        "joint_attention_kwargs": {"attention_mask": torch.cat([words, image], dim=1)[:, None, None]},
    }


def joyimage(head_dim: int, kind: Any = diffusers.JoyImageEditTransformer3DModel) -> torch.nn.Module:
    return kind(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        text_dim=16,
        mlp_width_ratio=1.0,
        num_layers=2,
        rope_dim_list=list(axes(head_dim)),
    )


def joyimage_inputs(model: Any) -> dict[str, Any]:
    """A picture and the one that is made."""
    return {
        "hidden_states": noise(BATCH, 2, 4, 1, 32, 12),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
    }


def joyimage_plus(head_dim: int) -> torch.nn.Module:
    return joyimage(head_dim, diffusers.JoyImageEditPlusTransformer3DModel)


def joyimage_plus_inputs(model: Any) -> dict[str, Any]:
    """The second sample has one reference fewer: 64 tokens, to which nothing attends, are in their place."""
    return {
        **joyimage_inputs(model),
        "hidden_states": noise(BATCH, 192, 4, 1, 2, 2),
        "encoder_hidden_states_mask": masked(12, 5).float(),
        "shape_list": [[(1, 8, 8), (1, 8, 8), (1, 8, 8)], [(1, 8, 8), (1, 8, 8)]],
    }


def hunyuan_image(head_dim: int) -> torch.nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(head_dim // 2, head_dim // 2),
    )


def hunyuan_image_inputs(model: Any) -> dict[str, Any]:
    _, h, w = tiny_models.IMAGE
    return {
        "hidden_states": noise(BATCH, 4, h, w),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": noise(BATCH, 7, 16),
        "encoder_attention_mask": masked(7, 2, total=7),
        "encoder_hidden_states_2": noise(BATCH, 5, 8),
        "encoder_attention_mask_2": masked(0, 4, total=5),
    }


def ernie(head_dim: int) -> torch.nn.Module:
    return filled(
        diffusers.ErnieImageTransformer2DModel(
            **HEADS,
            hidden_size=2 * head_dim,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=axes(head_dim),
        )
    )


def ernie_inputs(model: Any) -> dict[str, Any]:
    _, h, w = tiny_models.IMAGE
    return {
        "hidden_states": noise(BATCH, 4, h, w),
        "timestep": torch.full((BATCH,), 500.0),
        "text_bth": noise(BATCH, TEXT, 16),
        "text_lens": torch.tensor([12, 5]),
    }


def z_image(head_dim: int, **overrides: Any) -> torch.nn.Module:
    settings = {
        "in_channels": 4,
        "dim": 2 * head_dim,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [head_dim // 2, head_dim // 4, head_dim // 4],
        "axes_lens": [256, 32, 32],
    }
    return filled(diffusers.ZImageTransformer2DModel(**{**settings, **overrides}))


def z_image_inputs(model: Any) -> dict[str, Any]:
    """Captions of 40 and 20 words are filled up to 64 and 32."""
    _, h, w = tiny_models.IMAGE
    return {
        "x": [noise(4, 1, 2 * h, 2 * w), noise(4, 1, 2 * h, 2 * w) + 1],
        "t": torch.full((BATCH,), 0.5),
        "cap_feats": [noise(40, 16), noise(20, 16)],
    }


def z_image_omni_inputs(model: Any) -> dict[str, Any]:
    """Two captions, a reference of 96 tokens and the image, and 12 tokens of what an encoder says of the reference."""
    return {
        "x": [[noise(4, 1, 16, 24), noise(4, 1, 32, 24)]],
        "t": torch.full((1,), 0.5),
        "cap_feats": [[noise(40, 16), noise(20, 16)]],
        "siglip_feats": [[noise(3, 4, 8), None]],
        "image_noise_mask": [[0, 1]],
    }


def krea2(head_dim: int) -> torch.nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=axes(head_dim),
    )


def krea2_inputs(model: Any) -> dict[str, Any]:
    _, h, w = tiny_models.IMAGE
    return {
        "hidden_states": noise(BATCH, h * w, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 2, 16),
        "timestep": torch.full((BATCH,), 0.5),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image_ids(h, w)]),
        "encoder_attention_mask": masked(12, 5),
    }


def ideogram4(head_dim: int) -> torch.nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=2,
        attention_head_dim=head_dim,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=16,
        mrope_section=(head_dim // 4, head_dim // 8, head_dim // 8),
    )


def ideogram4_inputs(model: Any) -> dict[str, Any]:
    """Padding stands before the text, and before an image."""
    _, h, w = tiny_models.IMAGE
    length, words = TEXT + h * w, torch.tensor([12, 5])
    places = torch.arange(length).expand(BATCH, -1)
    padding = places < TEXT - words[:, None]
    text = (places < TEXT) & ~padding
    ids = torch.cat([torch.arange(TEXT).view(-1, 1).expand(-1, 3).float(), 100 + image_ids(h, w)]).long()
    image = (places >= TEXT)[..., None]
    return {
        "hidden_states": noise(BATCH, length, 4) * image,
        "timestep": torch.full((BATCH,), 0.5),
        "encoder_hidden_states": noise(BATCH, length, 16) * text[..., None],
        "position_ids": ids.expand(BATCH, -1, -1),
        "segment_ids": torch.where(padding, -1, 1),
        "indicator": torch.where(text, 3, 0).masked_fill(image[..., 0], 2),
    }


def sd3(head_dim: int) -> torch.nn.Module:
    """As SD3.5 medium: its first block attends over the image alone, too."""
    return diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=head_dim,
        joint_attention_dim=16,
        caption_projection_dim=2 * head_dim,
        pooled_projection_dim=8,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_inputs(model: Any) -> dict[str, Any]:
    _, h, w = tiny_models.IMAGE
    return {
        "hidden_states": noise(BATCH, 4, 2 * h, 2 * w),
        "encoder_hidden_states": noise(BATCH, TEXT, 16),
        "pooled_projections": noise(BATCH, 8),
        "timestep": torch.full((BATCH,), 500.0),
    }
