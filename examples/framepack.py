"""Framepack image-to-video, 91 frames of height 832: python framepack.py picture.png"""

import sys

import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from diffusers.utils import export_to_video, load_image
from transformers import SiglipImageProcessor, SiglipVisionModel

import rectified_spaattn as rsa

model = HunyuanVideoFramepackTransformer3DModel.from_pretrained("lllyasviel/FramePackI2V_HY", dtype=torch.bfloat16)
parts = {"feature_extractor": SiglipImageProcessor, "image_encoder": SiglipVisionModel}
parts = {name: kind.from_pretrained("lllyasviel/flux_redux_bfl", subfolder=name) for name, kind in parts.items()}
pipe = HunyuanVideoFramepackPipeline.from_pretrained(
    "hunyuanvideo-community/HunyuanVideo", transformer=model, dtype=torch.bfloat16, **parts
).to("cuda")
handle = rsa.enable(pipe)  # the preset hunyuan-video-t2v, the nearest: 80% sparse, history among the video

video = pipe(
    image=load_image(sys.argv[1]),
    prompt="A penguin dances in the snow",
    height=832,
    num_frames=91,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "framepack.mp4", fps=30)
print(handle.summary())
