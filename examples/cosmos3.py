"""Cosmos 3 Nano text-to-world."""

import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = Cosmos3OmniPipeline.from_pretrained("nvidia/Cosmos3-Nano", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    num_inference_steps=35,
    generator=torch.Generator().manual_seed(0),
).video
export_to_video(video, "cosmos3.mp4", fps=24)
print(handle.summary())
