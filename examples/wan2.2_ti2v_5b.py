"""Wan 2.2 TI2V, 5B, 121 frames of 704 x 1280 from a text. From an image: WanImageToVideoPipeline and image=..."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = WanPipeline.from_pretrained(
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers", dtype={"default": torch.bfloat16, "vae": torch.float32}
).to("cuda")
handle = rsa.enable(pipe)  # the preset wan2.2-ti2v-5b: 75% sparse after 10% of the steps, first two layers dense

video = pipe(
    prompt="A paper boat drifts down a rain-filled gutter past autumn leaves, seen from close to the water",
    height=704,
    width=1280,
    num_frames=121,
    num_inference_steps=50,
    guidance_scale=5.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "wan2.2-ti2v-5b.mp4", fps=24)
print(handle.summary())
