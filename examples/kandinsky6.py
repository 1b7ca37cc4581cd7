"""Kandinsky 6 Pro, distilled, five seconds of 864 x 480, without its sound."""

import torch
from diffusers import Kandinsky6TI2VAPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = Kandinsky6TI2VAPipeline.from_pretrained(
    "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers", dtype=torch.bfloat16
).to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=480,
    width=864,
    num_frames=121,
    num_inference_steps=16,
    guidance_scale=1.0,
    sample_audio=False,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "kandinsky6.mp4", fps=24)
print(handle.summary())
