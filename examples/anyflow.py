"""AnyFlow 14B in four steps, 81 frames of 480 x 832."""

import torch
from diffusers import AnyFlowPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = AnyFlowPipeline.from_pretrained("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset wan2.1-t2v, the nearest: a tenth of four steps is none, so all are sparse

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    num_frames=81,
    num_inference_steps=4,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "anyflow.mp4", fps=16)
print(handle.summary())
