"""Wan 2.2 text-to-video with two experts of 14B, one on the GPU at a time."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = WanPipeline.from_pretrained(
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers", dtype={"default": torch.bfloat16, "vae": torch.float32}
)
pipe.enable_model_cpu_offload()
handle = rsa.enable(pipe)  # the preset wan2.2-t2v-a14b: 85% sparse, three dense steps in one expert, one in the other

video = pipe(
    prompt="A lighthouse in a storm, waves breaking over the rocks, its beam sweeping through the rain",
    height=720,
    width=1280,
    num_frames=81,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "wan2.2-t2v-a14b.mp4", fps=16)
print(handle.summary())
