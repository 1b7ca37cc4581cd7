"""Mochi 1, 163 frames of 480 x 848."""

import torch
from diffusers import MochiPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = MochiPipeline.from_pretrained("genmo/mochi-1-preview", dtype=torch.bfloat16).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    num_frames=163,
    num_inference_steps=64,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "mochi.mp4", fps=30)
print(handle.summary())
