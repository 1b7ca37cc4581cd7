"""Ideogram 4, 2048 x 2048."""

import torch
from diffusers import Ideogram4Pipeline

import rectified_spaattn as rsa

pipe = Ideogram4Pipeline.from_pretrained("ideogram-ai/ideogram-v4", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    prompt="A lighthouse on a cliff at dawn, waves breaking below, every rock in sharp focus",
    height=2048,
    width=2048,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("ideogram4.png")
print(handle.summary())
