"""Real diffusers pipelines and transformers with tiny random components, built without a download."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

# what enable() gets for grids as small as these
SPARSE = {
    "sparsity": 0.75,
    "block_size": 16,
    "neighbours": False,
    "first_frame": False,
    "dense_layers": (),
    "dense_steps": 0,
    "top_p": 0.0,
}
ALL_BLOCKS = {**SPARSE, "sparsity": 0.0}
PROMPT_TEMPLATE = {"template": "describe the video {}", "crop_start": 3}


def forward(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def hunyuan_transformer(**overrides) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 10),
    }
    return HunyuanVideoTransformer3DModel(**{**settings, **overrides}).eval()


def hunyuan_inputs(batch: int = 2, grid: tuple[int, int, int] = (3, 8, 8), lengths: tuple[int, ...] = (12, 5)) -> dict:
    torch.manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, h, w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
        "encoder_attention_mask": torch.arange(12)[None] < torch.tensor(lengths[:batch])[:, None],
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def wan_transformer(**overrides) -> WanTransformer3DModel:
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**settings, **overrides}).eval()


def wan_inputs(batch: int = 2, grid: tuple[int, int, int] = (3, 8, 8)) -> dict:
    torch.manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 16, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
    }


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    transformer = hunyuan_transformer()
    llama = LlamaConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        vocab_size=64,
    )
    clip = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        projection_dim=32,
        vocab_size=64,
    )
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=_tokenizer(),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=_tokenizer(),
        transformer=transformer,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan_pipeline(experts: int = 1) -> WanPipeline:
    torch.manual_seed(0)
    text = UMT5Config(d_ff=16, d_kv=4, d_model=16, num_heads=4, num_layers=1, vocab_size=64, pad_token_id=1)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipeline = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_hunyuan(pipeline: HunyuanVideoPipeline, steps: int = 2, **overrides) -> torch.Tensor:
    """Latents of a 9-frame 64x64 clip: grid (3, 8, 8) after the VAE's 4x8x8."""
    arguments = {
        "prompt": "a b c",
        "prompt_template": PROMPT_TEMPLATE,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": steps,
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
    }
    return pipeline(**{**arguments, **overrides}).frames


def run_wan(pipeline: WanPipeline, steps: int = 2, **overrides) -> torch.Tensor:
    """Latents of a 9-frame 128x128 clip: grid (3, 8, 8) after the VAE's 4x8x8 and patches of 2x2."""
    arguments = {
        "prompt": "a b c",
        "negative_prompt": "d",
        "height": 128,
        "width": 128,
        "num_frames": 9,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
    }
    return pipeline(**{**arguments, **overrides}).frames


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<bos>", "<pad>", "<eos>", "<unk>", "describe", "the", "video", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=77,
        model_input_names=["input_ids", "attention_mask"],
    )
