"""JoyImage-Edit: python joyimage_edit.py picture.png"""

import sys

import torch
from diffusers import JoyImageEditPipeline
from diffusers.utils import load_image

import rectified_spaattn as rsa

pipe = JoyImageEditPipeline.from_pretrained("jdopensource/JoyAI-Image-Edit-Diffusers", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    image=load_image(sys.argv[1]),
    prompt="The same place in winter, snow on every roof",
    num_inference_steps=40,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("joyimage_edit.png")
print(handle.summary())
