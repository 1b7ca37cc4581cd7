"""Wan 2.2 image-to-video with two experts of 14B: python wan2.2_i2v_a14b.py first-frame.png"""

import sys

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

import rectified_spaattn as rsa

pipe = WanImageToVideoPipeline.from_pretrained(
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers", dtype={"default": torch.bfloat16, "vae": torch.float32}
)
pipe.enable_model_cpu_offload()
handle = rsa.enable(pipe)  # the preset wan2.2-i2v-a14b: 85% sparse in both, first two layers of each dense

video = pipe(
    image=load_image(sys.argv[1]),
    prompt="The camera circles slowly around the scene in warm evening light",
    height=720,
    width=1280,
    num_frames=81,
    num_inference_steps=40,
    guidance_scale=3.5,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "wan2.2-i2v-a14b.mp4", fps=16)
print(handle.summary())
