"""MiniMax-H3, five seconds of video with sound at 768 lines."""

import torch
from diffusers import ModularPipeline
from diffusers.utils import encode_video

import rectified_spaattn as rsa

pipe = ModularPipeline.from_pretrained("MiniMaxAI/MiniMax-H3", workflow="t2va")
pipe.load_components(dtype=torch.bfloat16)
pipe.to("cuda")
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

state = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    num_frames=124,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
)
sound = state.get("audio")[0]
encode_video(state.get("videos")[0], fps=24, output_path="minimax-h3.mp4", audio=sound, audio_sample_rate=32000)
print(handle.summary())
