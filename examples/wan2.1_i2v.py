"""Wan 2.1 image-to-video, 14B, 81 frames of 720 x 1280 from a first frame: python wan2.1_i2v.py first-frame.png"""

import sys

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

import rectified_spaattn as rsa

pipe = WanImageToVideoPipeline.from_pretrained(
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    dtype={"default": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32},
).to("cuda")
handle = rsa.enable(pipe)  # the preset wan2.1-i2v: 75% sparse, first two layers dense

video = pipe(
    image=load_image(sys.argv[1]),
    prompt="The camera moves slowly closer while the wind stirs leaves and hair",
    height=720,
    width=1280,
    num_frames=81,
    guidance_scale=5.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "wan2.1-i2v.mp4", fps=16)
print(handle.summary())
