"""CogVideoX 1.5 text-to-video, 5B, 81 frames of 768 x 1360."""

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

import rectified_spaattn as rsa

pipe = CogVideoXPipeline.from_pretrained("zai-org/CogVideoX1.5-5B", dtype=torch.bfloat16).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset cogvideox1.5-t2v: 85% sparse after 10% of the steps

video = pipe(
    prompt="A hummingbird hovers in front of a red flower, wings blurred, morning dew on the petals",
    height=768,
    width=1360,
    num_frames=81,
    num_inference_steps=50,
    guidance_scale=6.0,
    use_dynamic_cfg=True,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "cogvideox1.5-t2v.mp4", fps=16)
print(handle.summary())
