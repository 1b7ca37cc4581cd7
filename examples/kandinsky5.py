"""Kandinsky 5 Lite text-to-video, five seconds of 768 x 512."""

import torch
from diffusers import Kandinsky5T2VPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = Kandinsky5T2VPipeline.from_pretrained(
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", dtype=torch.bfloat16
).to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=512,
    width=768,
    num_frames=121,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "kandinsky5.mp4", fps=24)
print(handle.summary())
