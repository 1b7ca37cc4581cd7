"""FLUX.1 Kontext, an edited picture: python flux.1_kontext.py picture.png"""

import sys

import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import load_image

import rectified_spaattn as rsa

pipe = FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    image=load_image(sys.argv[1]),
    prompt="Make it night, with lamps in the windows",
    guidance_scale=2.5,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("flux.1_kontext.png")
print(handle.summary())
