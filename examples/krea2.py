"""Krea 2, 2048 x 2048."""

import torch
from diffusers import Krea2Pipeline

import rectified_spaattn as rsa

pipe = Krea2Pipeline.from_pretrained("krea/Krea-2-Raw", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    prompt="A lighthouse on a cliff at dawn, waves breaking below, every rock in sharp focus",
    height=2048,
    width=2048,
    num_inference_steps=28,
    guidance_scale=4.5,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("krea2.png")
print(handle.summary())
