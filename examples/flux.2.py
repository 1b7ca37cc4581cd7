"""FLUX.2 with a reference, 2048 x 2048: python flux.2.py reference.png"""

import sys

import torch
from diffusers import Flux2Pipeline
from diffusers.utils import load_image

import rectified_spaattn as rsa

pipe = Flux2Pipeline.from_pretrained("black-forest-labs/FLUX.2-dev", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    image=load_image(sys.argv[1]),
    prompt="The same place in winter, snow on every roof",
    height=2048,
    width=2048,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("flux.2.png")
print(handle.summary())
