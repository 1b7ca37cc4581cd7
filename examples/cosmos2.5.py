"""Cosmos Predict 2.5 text-to-world, 93 frames of 704 x 1280."""

import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
    "nvidia/Cosmos-Predict2.5-2B", revision="diffusers/base/post-trained", dtype=torch.bfloat16
).to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=704,
    width=1280,
    num_frames=93,
    num_inference_steps=36,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "cosmos2.5.mp4", fps=16)
print(handle.summary())
