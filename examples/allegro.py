"""Allegro, 88 frames of 720 x 1280."""

import torch
from diffusers import AllegroPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = AllegroPipeline.from_pretrained("rhymes-ai/Allegro", dtype=torch.bfloat16).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    num_inference_steps=100,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "allegro.mp4", fps=15)
print(handle.summary())
