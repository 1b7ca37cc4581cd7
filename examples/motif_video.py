"""Motif-Video 2B, five seconds of 1280 x 736."""

import torch
from diffusers import MotifVideoPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = MotifVideoPipeline.from_pretrained("Motif-Technologies/Motif-Video-2B", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=736,
    width=1280,
    num_frames=121,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "motif-video.mp4", fps=24)
print(handle.summary())
