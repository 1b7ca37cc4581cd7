"""The small model that comes with the package, generated twice: with full and with rectified sparse attention."""

import torch

import rectified_spaattn as rsa
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = load_demo_pipeline(device)
prompt = "a red metal sphere rolls right in front of a blue striped cube, checkered floor"
settings = {"height": 96, "width": 96, "num_frames": 16}

full = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).frames[0]
with rsa.enable(pipe, sparsity=0.8, block_size=64) as handle:
    sparse = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).frames[0]
    print(handle.summary())
error = (full - sparse).square().mean()
print(f"PSNR against full attention: {-10 * error.log10().item():.1f} dB")
