"""ConsisID, six seconds of 720 x 480 of a person: python consisid.py face.png. Needs opencv, insightface and more."""

import sys

import torch
from diffusers import ConsisIDPipeline
from diffusers.pipelines.consisid.consisid_utils import prepare_face_models, process_face_embeddings_infer
from diffusers.utils import export_to_video
from huggingface_hub import snapshot_download

import rectified_spaattn as rsa

folder = snapshot_download("BestWishYsh/ConsisID-preview")
helper, other, clip, main, mean, std = prepare_face_models(folder, device="cuda", dtype=torch.bfloat16)
face = process_face_embeddings_infer(
    helper, clip, other, mean, std, main, "cuda", torch.bfloat16, sys.argv[1], is_align_face=True
)
pipe = ConsisIDPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
handle = rsa.enable(pipe)  # the preset cogvideox1.5-i2v, the nearest: 75% sparse after 10% of the steps
video = pipe(
    image=face[2],
    id_cond=face[0],
    id_vit_hidden=face[1],
    kps_cond=face[3],
    prompt="A woman walks through a market, the camera moves with her",
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "consisid.mp4", fps=8)
print(handle.summary())
