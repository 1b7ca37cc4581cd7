"""FLUX.3, 2048 x 2048: python flux.3.py FOLDER, where FOLDER has the weights, or a repository's name."""

import sys

import torch
from diffusers import ModularPipeline

import rectified_spaattn as rsa

pipe = ModularPipeline.from_pretrained(sys.argv[1])
pipe.load_components(dtype=torch.bfloat16)
pipe.to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

state = pipe(
    prompt="A lighthouse on a cliff at dawn, waves breaking below, every rock in sharp focus",
    height=2048,
    width=2048,
    num_inference_steps=28,
    generator=torch.Generator().manual_seed(0),
)
state.get("images")[0].save("flux.3.png")
print(handle.summary())
