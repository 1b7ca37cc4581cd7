"""A diffusers pipeline for the demo model: caption in, video out, no VAE in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .model import PATCH_SIZE, CaptionEncoder, tokenize

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT_STEPS = 12


@dataclass
class DemoVideoOutput(BaseOutput):
    """`frames`: float Tensor [B, T, 3, H, W] in [0, 1], or ndarray [B, T, H, W, 3] for output_type "np"."""

    frames: Tensor | np.ndarray


class DemoVideoPipeline(DiffusionPipeline):
    """Text to video with the demo model, by Euler steps of flow matching on pixels."""

    model_cpu_offload_seq = "caption_encoder->transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        caption_encoder: CaptionEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, caption_encoder=caption_encoder, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the current or last call, as pipelines of diffusers have it."""
        return len(self.scheduler.timesteps)

    def encode_prompt(self, prompt: str | list[str], device: torch.device) -> dict[str, Tensor]:
        """The transformer's text arguments: embeddings [B, 32, E], mask bool [B, 32] of True, pooled [B, E]."""
        ids = tokenize(prompt).to(device)
        embeds, pooled = self.caption_encoder(ids)
        dtype = self.transformer.dtype
        return {
            "encoder_hidden_states": embeds.to(dtype),
            "encoder_attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "pooled_projections": pooled.to(dtype),
        }

    def _velocity(self, latents: Tensor, timestep: Tensor, text: dict[str, Tensor], context: str) -> Tensor:
        with self.transformer.cache_context(context):
            return self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=timestep.expand(latents.shape[0]),
                **text,
                return_dict=False,
            )[0].float()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int = 64,
        width: int = 64,
        num_frames: int = 16,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> DemoVideoOutput | tuple[Tensor | np.ndarray]:
        """Make one video for each prompt.

        `height` and `width` are multiples of 4; the model was trained on 16 frames of 64 x 64.
        `guidance_scale` above 1 adds a second, caption-free forward a step. `callback_on_step_end(pipe, step, timestep,
        {"latents": ...})` returns a dict whose "latents", if any, replace the current ones. Returns `DemoVideoOutput`
        (or a tuple), frames in [0, 1]: "pt" [B, T, 3, H, W], "np" [B, T, H, W, 3]. ValueError or TypeError, with what
        is allowed, for bad arguments.
        """
        _check(height, width, num_frames, num_inference_steps, output_type)
        device = self._execution_device
        text = self.encode_prompt(prompt, device)
        batch = text["pooled_projections"].shape[0]
        empty = self.encode_prompt([""] * batch, device) if guidance_scale > 1 else None
        shape = (batch, 3, num_frames, height, width)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                velocity = self._velocity(latents, timestep, text, "cond")
                if empty is not None:
                    free = self._velocity(latents, timestep, empty, "uncond")
                    velocity = free + guidance_scale * (velocity - free)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents})
                    latents = changed.get("latents", latents)
                progress.update()
        frames = (latents.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            frames = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
        self.maybe_free_model_hooks()
        return DemoVideoOutput(frames=frames) if return_dict else (frames,)


def _check(height: int, width: int, num_frames: int, steps: int, output_type: str) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < PATCH_SIZE or value % PATCH_SIZE:
            raise ValueError(f"{name} must be a positive multiple of {PATCH_SIZE}, got {value}; try 64")
    for name, value in (("num_frames", num_frames), ("num_inference_steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if output_type not in ("pt", "np"):
        raise ValueError(f'output_type must be "pt" or "np", got {output_type!r}')


def load_demo_pipeline(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, weights: str | Path = WEIGHTS
) -> DemoVideoPipeline:
    """The demo pipeline with the packaged weights (or those in `weights`), in `dtype` on `device`.

    RuntimeError if the folder holds no weights. Nothing is downloaded.
    """
    root = Path(weights)
    if not (root / "transformer" / "config.json").is_file():
        raise RuntimeError(f"no demo weights in {root}: reinstall the package, or train them with studies/demo_model")
    options = {"dtype": dtype, "local_files_only": True, "low_cpu_mem_usage": False, "use_safetensors": True}
    return DemoVideoPipeline(
        transformer=HunyuanVideoTransformer3DModel.from_pretrained(root / "transformer", **options).eval(),
        caption_encoder=CaptionEncoder.from_pretrained(root / "caption_encoder", **options).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler", local_files_only=True),
    ).to(device)
