"""Qwen-Image-Edit, an edited picture: python qwen_image_edit.py picture.png"""

import sys

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.utils import load_image

import rectified_spaattn as rsa

pipe = QwenImageEditPlusPipeline.from_pretrained("Qwen/Qwen-Image-Edit-2509", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset image: 80% sparse, chosen here and not published

image = pipe(
    image=load_image(sys.argv[1]),
    prompt="Make it night, with lamps in the windows",
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("qwen_image_edit.png")
print(handle.summary())
