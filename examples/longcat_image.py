"""LongCat-Image, 1344 x 768."""

import torch
from diffusers import LongCatImagePipeline

import rectified_spaattn as rsa

pipe = LongCatImagePipeline.from_pretrained("meituan-longcat/LongCat-Image", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    prompt="A lighthouse on a cliff at dawn, waves breaking below, every rock in sharp focus",
    height=768,
    width=1344,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("longcat_image.png")
print(handle.summary())
