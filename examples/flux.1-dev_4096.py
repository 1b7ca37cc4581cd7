"""FLUX.1-dev with the tile upscaler ControlNet, 4096 x 4096: python flux.1-dev_4096.py small-square-picture.png"""

import sys

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from diffusers.utils import load_image

import rectified_spaattn as rsa

controlnet = FluxControlNetModel.from_pretrained("jasperai/Flux.1-dev-Controlnet-Upscaler", dtype=torch.bfloat16)
pipe = FluxControlNetPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-dev", controlnet=controlnet, dtype=torch.bfloat16
).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset flux.1-dev-4096: 90% sparse

image = pipe(
    prompt="",
    control_image=load_image(sys.argv[1]).resize((4096, 4096)),
    controlnet_conditioning_scale=0.6,
    num_inference_steps=28,
    guidance_scale=3.5,
    height=4096,
    width=4096,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("flux.1-dev-4096.png")
print(handle.summary())
