"""HunyuanImage 2.1, 2048 x 2048."""

import torch
from diffusers import HunyuanImagePipeline

import rectified_spaattn as rsa

pipe = HunyuanImagePipeline.from_pretrained(
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers", dtype=torch.bfloat16
).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    prompt="A lighthouse on a cliff at dawn, waves breaking below, every rock in sharp focus",
    height=2048,
    width=2048,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("hunyuan_image.png")
print(handle.summary())
