"""LTX-2, five seconds of video with sound, 768 x 512."""

import torch
from diffusers import LTX2Pipeline
from diffusers.utils import encode_video

import rectified_spaattn as rsa

pipe = LTX2Pipeline.from_pretrained("Lightricks/LTX-2", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
handle = rsa.enable(pipe)  # the preset video: 80% sparse, the first tenth of the steps and the first two layers dense

video, audio = pipe(
    prompt="A potter shapes a bowl on a turning wheel, wet clay glistening under a window",
    width=768,
    height=512,
    num_frames=121,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
    return_dict=False,
)
sound = {"audio": audio[0].float().cpu(), "audio_sample_rate": pipe.vocoder.config.output_sampling_rate}
encode_video(video[0], fps=24, output_path="ltx2.mp4", **sound)
print(handle.summary())
