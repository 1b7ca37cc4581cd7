"""`sglang generate` as a user runs it, with a tiny random Wan: worker processes, text encoder, denoising loop, VAE.

    python tests/engine_sglang_generate.py

The python has sglang[diffusion] and this package installed. Without a GPU, plain PyTorch stands for two norms whose CPU
kernels come with no wheel. Prints a line a run; exits with 1 at the first one that fails.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch

import tiny

STEPS, LAYERS = 4, 3
SPARSE = {"sparsity": 0.7, "top_p": 0.0, "block_size": 16, "dense_steps": 1}
RUNS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "full": SPARSE | {"sparsity": 0.0, "top_p": 1.0},
    "sparse": SPARSE,
}
LEVELS = 0.1  # of 255, on average: the video is compressed
NORMS = """
def norm(layer, x, shift, scale):
    return (layer.norm(x) * (1 + scale) + shift).to(x.dtype)


def after_residual(layer, residual, x, gate, shift, scale):
    x = residual + x * gate
    return norm(layer, x, shift, scale), x


def plugin():
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    for name, plain in (("_NormScaleShift", norm), ("_ScaleResidualNormScaleShift", after_residual)):
        target = f"sglang.multimodal_gen.runtime.layers.layernorm.{name}.forward_cpu"
        HookRegistry.register(target, plain, HookType.REPLACE)
"""


def plain_norms(folder: Path) -> None:
    """A plug-in for SGLang, as if it were installed in a folder of the path."""
    (folder / "plain_norms.py").write_text(NORMS)
    about = folder / "plain_norms-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plain_norms\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[sglang.multimodal_gen.plugins]\nplain_norms = plain_norms:plugin\n")


def generate(folder: Path, name: str, config: dict[str, Any] | None) -> tuple[np.ndarray, str]:
    """Frames [T, H, W, 3] of one run and what it wrote to its log."""
    plugins = ["rectified_spaattn"] + ([] if torch.cuda.is_available() else ["plain_norms"])
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = {} if config is None else {"rectified_spaattn": config}
    options = {
        "model-path": str(folder / "Wan2.1-T2V-1.3B-Diffusers"),  # SGLang knows the settings of a model by this name
        "prompt": "a b c",
        "height": "128",
        "width": "128",
        "num-frames": "9",
        "num-inference-steps": str(STEPS),
        "attention-backend": "torch_sdpa",
        "attention-backend-config": json.dumps(asked),
        "output-path": str(folder),
        "output-file-name": f"{name}.mp4",
    }
    command = [str(Path(sys.executable).with_name("sglang")), "generate"]
    done = subprocess.run(
        [*command, *(word for option, value in options.items() for word in (f"--{option}", value))],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"} | {"SGLANG_PLUGINS": ",".join(plugins), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not (folder / f"{name}.mp4").exists():
        raise RuntimeError(f"{name}: sglang generate gave {done.returncode} and no video:\n{done.stdout[-4000:]}")
    return imageio.imread(folder / f"{name}.mp4").astype(float), done.stdout


def check(name: str, video: np.ndarray, dense: np.ndarray, log: str) -> str:
    off = float(np.abs(video - dense).mean())
    if name == "dense":
        assert "Rectified SpaAttn" not in log
        return f"{video.shape[0]} frames"
    sparse = re.search(r"sparse: (\d+) calls, density ([\d.]+)%", log)
    assert sparse, log[-4000:]
    calls = 2 * (STEPS - 1) * LAYERS  # with guidance; the first step is dense
    assert int(sparse[1]) == calls, log[-4000:]
    assert f"dense:  {2 * LAYERS} calls, because of dense_steps" in log
    assert (off < LEVELS) == (name != "sparse"), off
    return f"{calls} sparse calls, density {sparse[2]}%, {off:.2f} of 255 off the dense video"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain_norms(folder)
        tiny.wan_pipeline().save_pretrained(folder / "Wan2.1-T2V-1.3B-Diffusers")
        dense = None
        for name, config in RUNS.items():
            video, log = generate(folder, name, config)
            dense = video if dense is None else dense
            print(f"  {name}: {check(name, video, dense, log)}", flush=True)


if __name__ == "__main__":
    main()
