"""EasyAnimate 5.1, 49 frames of 512 x 512."""

import torch
from diffusers import EasyAnimatePipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = EasyAnimatePipeline.from_pretrained("alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers", dtype=torch.bfloat16).to(
    "cuda"
)
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=512,
    width=512,
    num_frames=49,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "easyanimate.mp4", fps=8)
print(handle.summary())
