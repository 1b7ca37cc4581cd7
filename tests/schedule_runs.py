"""Runs of tiny Wan pipelines, step by step: what was sparse and what dense, stopped early, from a video."""

import torch
from diffusers import WanVideoToVideoPipeline
from PIL import Image

FRAME = Image.new("RGB", (128, 128), (200, 30, 90))


def forwards_of(model) -> list[str]:
    """A list that gets "s" (sparse) or "d" at each forward of an enabled Wan transformer, by its last layer."""
    log, attention, sparse = [], model.blocks[-1].attn1, []

    def before(module, args):
        sparse.append(module.processor.rectified_layer.record.sparse)

    def after(module, args, output):
        log.append("s" if module.processor.rectified_layer.record.sparse > sparse.pop() else "d")

    attention.register_forward_pre_hook(before)
    attention.register_forward_hook(after)
    return log


def steps_of(log: list[str], forwards: int = 2) -> str:
    """One letter a step of `forwards` forwards each, all of one kind; empties the log."""
    steps = [set(log[i : i + forwards]) for i in range(0, len(log), forwards)]
    assert all(len(step) == 1 for step in steps), log
    log.clear()
    return "".join(step.pop() for step in steps)


def video_to_video(components: dict, **overrides) -> WanVideoToVideoPipeline:
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    made = WanVideoToVideoPipeline(**{**{name: components[name] for name in names}, **overrides})
    made.set_progress_bar_config(disable=True)
    return made


# the prompt as embeddings: diffusers' I2V and V2V pipelines clean text with a package that is not needed otherwise
EMBEDS = {
    "prompt_embeds": torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(5)),
    "negative_prompt_embeds": torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(6)),
}


def run_video(pipeline: WanVideoToVideoPipeline, steps: int, strength: float) -> torch.Tensor:
    return pipeline(
        video=[FRAME] * 9,
        strength=strength,
        height=128,
        width=128,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **EMBEDS,
    ).frames


def stop_after(step, how):
    def stop(pipe, index, timestep, kwargs):
        if index == step:
            how(pipe)
        return kwargs

    return stop


def interrupt(pipe):
    pipe._interrupt = True


def fail(pipe):
    raise KeyboardInterrupt
