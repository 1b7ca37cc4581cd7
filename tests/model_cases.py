"""The supported transformer classes and the ways they are used, each with what enable() must do to it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiny_image_models import (
    bria,
    bria_fibo,
    bria_fibo_inputs,
    ernie,
    ernie_inputs,
    flux3,
    flux3_inputs,
    hunyuan_image,
    hunyuan_image_inputs,
    ideogram4,
    ideogram4_inputs,
    joyimage,
    joyimage_inputs,
    joyimage_plus,
    joyimage_plus_inputs,
    krea2,
    krea2_inputs,
    longcat,
    longcat_inputs,
    ovis,
    sd3,
    sd3_inputs,
    z_image,
    z_image_inputs,
    z_image_omni_inputs,
)
from tiny_joint_models import (
    allegro,
    allegro_inputs,
    consisid,
    consisid_inputs,
    easyanimate,
    easyanimate_inputs,
    framepack,
    framepack_inputs,
    mochi,
    mochi_inputs,
    motif_inputs,
    motif_video,
)
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
from tiny_video_models import (
    AUDIO,
    COSMOS25,
    COSMOS25_PICTURE,
    anyflow,
    anyflow_inputs,
    chronoedit,
    cosmos,
    cosmos3,
    cosmos3_inputs,
    cosmos25_inputs,
    cosmos_inputs,
    h3_inputs,
    h3_reference_inputs,
    kandinsky5,
    kandinsky5_inputs,
    kandinsky6,
    kandinsky6_inputs,
    kandinsky6_sr,
    kandinsky6_sr_inputs,
    ltx23,
    ltx23_inputs,
    ltx25,
    ltx25_inputs,
    minimax_h3,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to use a transformer class.

    sparse     names of the processors that are exchanged, as a regular expression; calls: how many there are
    head_dims  a tiny one, and one the kernels are made for
    preset     found from the transformer alone
    text       tokens beside the video or image
    axes       what the dimensions of the video are where it is not packed, "list" for one video a sample; "tail" where
               other tokens are packed before it; "" where no token is found by its place
    sample, words  names of the inputs of video and text; "" where text reaches every token by modulation, too
    tiled      tokens that can be tiled in the first layer
    of_video   of what forward gives, the part that anybody reads
    """

    make: Callable[[int], torch.nn.Module]
    inputs: Callable[[torch.nn.Module], dict[str, Any]]
    sparse: str
    calls: int
    head_dims: tuple[int, int]
    preset: str
    text: int = 0
    axes: str = "bcthw"
    sample: str = "hidden_states"
    words: str = "encoder_hidden_states"
    tiled: int = 192
    of_video: Callable[[torch.Tensor], torch.Tensor] = lambda out: out

    @property
    def kind(self) -> str:
        """The name of the class."""
        with torch.device("meta"):
            return type(self.make(self.head_dims[0])).__name__


SELF = r"blocks\.\d+\.attn1\.processor"
JOINT = r"(single_)?transformer_blocks\.\d+\.attn\.processor"
COGVIDEOX = r"transformer_blocks\.\d+\.attn1\.processor"
CASES: dict[str, Case] = {}


def case(name: str, make: Any, inputs: Any, sparse: str, calls: int, preset: str, text: int = 0, **more: Any):
    CASES[name] = Case(
        make=make,
        inputs=inputs,
        sparse=sparse,
        calls=calls,
        preset=preset,
        text=text,
        **{"head_dims": (16, 128), **more},
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
for name, make, preset in (
    ("1.0", lambda d: cogvideox(d, use_rotary_positional_embeddings=False), "cogvideox1.5-t2v"),
    ("1.5 T2V", cogvideox15, "cogvideox1.5-t2v"),
    ("1.5 I2V", lambda d: cogvideox15(d, in_channels=8, ofs_embed_dim=8), "cogvideox1.5-i2v"),
):
    case(f"CogVideoX {name}", make, cogvideox_inputs, COGVIDEOX, 2, preset, TEXT, head_dims=(16, 64), axes="btchw")
case("Flux.1", flux, flux_inputs, JOINT, 3, "flux.1-dev-4096", TEXT)
case("Flux.2", flux2, flux2_inputs, JOINT, 3, "image", TEXT)
case("Qwen-Image", qwen, qwen_inputs, JOINT, 2, "image", TEXT)
case("LTX-Video", ltx, ltx_inputs, COGVIDEOX, 2, "video", head_dims=(16, 64))
case("LTX-2", ltx2, ltx2_inputs, COGVIDEOX, 2, "video")
case("LTX-Video, conditions", ltx, ltx_coordinates, COGVIDEOX, 2, "video", head_dims=(16, 64))

FIRST = tuple(CASES)  # what tests of matters that are the same for all models go over

# of later years, of one head size

VISUAL = r"visual_transformer_blocks\.\d+\.self_attention\.processor"
LAYERS = r"layers\.\d+\.(self_)?attention\.processor"


def later(name: str, make: Any, inputs: Any, sparse: str, calls: int, preset: str, text: int = 0, **more: Any):
    case(name, make, inputs, sparse, calls, preset, text, **{"head_dims": (16,), **more})


later("MiniMax-H3", minimax_h3, h3_inputs, JOINT, 2, "video", TEXT + AUDIO)
later(
    "MiniMax-H3, first and last frame",
    minimax_h3,
    lambda model: h3_inputs(model, ("first", "last")),
    JOINT,
    2,
    "video",
    TEXT + AUDIO,
    axes="tail",
    tiled=192 + 2 * 48,
)
later(
    "MiniMax-H3, references",
    minimax_h3,
    h3_reference_inputs,
    JOINT,
    2,
    "video",
    TEXT + 2 * AUDIO,
    axes="tail",
    tiled=192 + 4 + 192,
)
later("LTX-2.3", ltx23, ltx23_inputs, COGVIDEOX, 2, "video")
later("LTX-2.5, a keyframe", ltx25, ltx25_inputs, COGVIDEOX, 2, "video", tiled=192 + 48)
later("Kandinsky 5", kandinsky5, kandinsky5_inputs, VISUAL, 2, "video", axes="bthwc")
later(
    "Kandinsky 6",
    kandinsky6,
    kandinsky6_inputs,
    r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention\.processor",
    2,
    "video",
    axes="bthwc",
)
later("Kandinsky 6 SR", kandinsky6_sr, kandinsky6_sr_inputs, VISUAL, 2, "video", axes="", words="")
later("ChronoEdit", chronoedit, wan_inputs, SELF, 2, "wan2.1-i2v")
later("AnyFlow", anyflow, anyflow_inputs, SELF, 2, "wan2.1-t2v", axes="btchw")
later("Cosmos Predict 1, 2", cosmos, cosmos_inputs, COGVIDEOX, 2, "video")
later(
    "Cosmos 2.5",
    lambda d: cosmos(d, **COSMOS25, **COSMOS25_PICTURE),
    cosmos25_inputs,
    COGVIDEOX,
    2,
    "video",
    words="",
)
later(
    "Cosmos 3",
    cosmos3,
    cosmos3_inputs,
    r"layers\.\d+\.self_attn\.processor",
    2,
    "video",
    TEXT + AUDIO,
    axes="list",
    sample="vision_tokens",
    words="",
)
later("Motif-Video", motif_video, motif_inputs, JOINT, 3, "video", TEXT)
later("Motif-Video I2V", motif_video, lambda model: motif_inputs(model, image=True), JOINT, 3, "video", TEXT + 3)
later("Mochi", mochi, mochi_inputs, COGVIDEOX, 2, "video", TEXT, words="")
later("Allegro", allegro, allegro_inputs, COGVIDEOX, 2, "video", head_dims=(24,))
later("EasyAnimate", easyanimate, easyanimate_inputs, COGVIDEOX, 2, "video", TEXT)
later("ConsisID", consisid, consisid_inputs, COGVIDEOX, 2, "cogvideox1.5-i2v", TEXT, axes="btchw")
later("Framepack", framepack, framepack_inputs, JOINT, 2, "hunyuan-video-t2v", TEXT + 3, axes="", tiled=316)
FLUX3 = r"(mode_blocks\.image(_cond)?|single_transformer_blocks)\.\d+\.attn\.processor"
later("Flux.3", flux3, flux3_inputs, FLUX3, 2, "image", TEXT)
later(
    "Flux.3 with a reference",
    flux3,
    lambda model: flux3_inputs(model, (8, 12)),
    FLUX3,
    3,
    "image",
    TEXT,
)
later("LongCat-Image", longcat, longcat_inputs, JOINT, 2, "image", TEXT)
later("Ovis-Image", ovis, longcat_inputs, JOINT, 2, "image", TEXT)
later("Bria 3", bria, longcat_inputs, JOINT, 2, "image", TEXT)
later("Bria FIBO", bria_fibo, bria_fibo_inputs, JOINT, 2, "image", TEXT)
DOUBLE = r"double_blocks\.\d+\.attn\.processor"
later("JoyImage-Edit", joyimage, joyimage_inputs, DOUBLE, 2, "image", TEXT, axes="")
later(
    "JoyImage-Edit Plus",
    joyimage_plus,
    joyimage_plus_inputs,
    DOUBLE,
    2,
    "image",
    TEXT,
    axes="",
    of_video=lambda out: out[:, :128],
)
later("HunyuanImage", hunyuan_image, hunyuan_image_inputs, JOINT, 2, "image", TEXT, axes="bchw", words="")
later("ERNIE-Image", ernie, ernie_inputs, LAYERS, 2, "image", TEXT, axes="bchw", words="text_bth")
Z_IMAGE = r"(noise_refiner|layers)\.\d+\.attention\.processor"
later("Z-Image", z_image, z_image_inputs, Z_IMAGE, 2, "image", 64, axes="list", sample="x", words="cap_feats")
later(
    "Z-Image Omni",
    lambda d: z_image(d, siglip_feat_dim=8),
    z_image_omni_inputs,
    Z_IMAGE,
    2,
    "image",
    96 + 64,
    axes="",
    words="",
    tiled=96 + 192,
)
later("Krea-2", krea2, krea2_inputs, JOINT, 2, "image", TEXT)
later(
    "Ideogram-4", ideogram4, ideogram4_inputs, LAYERS, 2, "image", TEXT, axes="tail", of_video=lambda out: out[:, TEXT:]
)
later("SD3.5", sd3, sd3_inputs, r"transformer_blocks\.\d+\.attn2?\.processor", 3, "image", TEXT, axes="bchw")


@functools.cache
def built(name: str, head_dim: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """As `build`, shared by tests that leave it as it was."""
    return build(name, head_dim)


def build(name: str, head_dim: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a case with the same random weights every time, and its forward arguments."""
    torch.manual_seed(0)
    model = CASES[name].make(head_dim).eval()
    return model, CASES[name].inputs(model)
