"""CogVideoX 1.5 image-to-video, 5B, 81 frames of 768 x 1360: python cogvideox1.5_i2v.py first-frame.png"""

import sys

import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

import rectified_spaattn as rsa

pipe = CogVideoXImageToVideoPipeline.from_pretrained("zai-org/CogVideoX1.5-5B-I2V", dtype=torch.bfloat16).to("cuda")
pipe.vae.enable_tiling()
handle = rsa.enable(pipe)  # the preset cogvideox1.5-i2v: 75% sparse after 10% of the steps

video = pipe(
    image=load_image(sys.argv[1]),
    prompt="Clouds drift and grass bends in the wind while the light slowly changes",
    height=768,
    width=1360,
    num_frames=81,
    num_inference_steps=50,
    guidance_scale=6.0,
    use_dynamic_cfg=True,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "cogvideox1.5-i2v.mp4", fps=16)
print(handle.summary())
