"""ChronoEdit, a picture edited as a short video: python chronoedit.py picture.png"""

import sys

import torch
from diffusers import ChronoEditPipeline
from diffusers.utils import export_to_video, load_image

import rectified_spaattn as rsa

pipe = ChronoEditPipeline.from_pretrained("nvidia/ChronoEdit-14B-Diffusers", dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset wan2.1-i2v, the nearest: 75% sparse, first two layers dense

video = pipe(
    image=load_image(sys.argv[1]),
    prompt="The cup tips over and tea runs across the table",
    height=720,
    width=1280,
    num_frames=5,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "chronoedit.mp4", fps=16)
print(handle.summary())
