"""HunyuanVideo text-to-video, 129 frames of 720 x 1280."""

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = HunyuanVideoPipeline.from_pretrained(
    "hunyuanvideo-community/HunyuanVideo", dtype={"default": torch.float16, "transformer": torch.bfloat16}
).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset hunyuan-video-t2v: 80% sparse in every step and layer

video = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    height=720,
    width=1280,
    num_frames=129,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "hunyuan-video.mp4", fps=24)
print(handle.summary())
