"""Two nodes: one patches a model, the other reports what the last run did."""

from typing import Any

import torch

from ...config import RECTIFY, SparseConfig
from ...presets import PRESETS
from ..picture import picture
from .override import override_of, patch

CATEGORY = "model_patches/attention"
CUSTOM, PAPER = "custom", "paper"
MODES = (*RECTIFY, PAPER)


def _preset_names() -> dict[str, SparseConfig]:
    """One name a config: the experts of Wan 2.2 A14B have one each."""
    names = {}
    for name, configs in PRESETS.items():
        suffixes = ("",) if len(configs) == 1 else (" (high noise)", " (low noise)")
        names.update({name + suffix: config for suffix, config in zip(suffixes, configs, strict=True)})
    return names


def config_of(
    sparsity: float,
    mode: str,
    dense_first: float,
    dense_last: float,
    dense_blocks: str,
    preset: str,
    tolerance: float = 0.0,
    replan: int = SparseConfig().replan,
) -> SparseConfig:
    """The settings of the node's inputs; percents are of the sampler's steps, a tolerance of 0 is none.

    Raises ValueError for blocks that are no list of numbers.
    """
    if preset != CUSTOM:
        return _preset_names()[preset].replace(tolerance=tolerance or None, replan=replan)
    words = dense_blocks.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"dense_blocks: got {dense_blocks!r}; allowed: block numbers from 0, such as '0, 1', or none.")
    config = SparseConfig.paper() if mode == PAPER else SparseConfig(rectify=mode)  # type: ignore[arg-type]
    return config.replace(
        sparsity=sparsity,
        tolerance=tolerance or None,
        replan=replan,
        dense_steps=dense_first / 100,
        dense_last_steps=dense_last / 100,
        dense_layers=tuple(int(word) for word in words),
    )


class RectifiedAttention:
    """Model in, model out: its video self-attention runs block-sparse and rectified."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Makes the self-attention of video and image transformers block-sparse and repairs what that breaks."
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        percent = {"min": 0.0, "max": 99.0, "step": 1.0}
        return {
            "required": {
                "model": ("MODEL",),
                "sparsity": (
                    "FLOAT",
                    {
                        "default": SparseConfig().sparsity,
                        "min": 0.0,
                        "max": 0.99,
                        "step": 0.01,
                        "tooltip": "Fraction of the attention blocks that may be dropped. 0 is full attention.",
                    },
                ),
                "mode": (
                    list(MODES),
                    {
                        "default": SparseConfig().rectify,
                        "tooltip": "row+slope: the default. row: a little faster, further from full attention. paper: "
                        "arXiv 2511.19835 on blocks in space. none: plain block-sparse.",
                    },
                ),
                "dense_first": (
                    "FLOAT",
                    {
                        "default": 10.0,
                        "tooltip": "Percent of the sampler's first steps with full attention.",
                        **percent,
                    },
                ),
                "dense_last": (
                    "FLOAT",
                    {"default": 0.0, "tooltip": "Percent of the sampler's last steps with full attention.", **percent},
                ),
                "dense_blocks": (
                    "STRING",
                    {"default": "", "tooltip": "Numbers of the blocks that keep full attention, such as 0, 1."},
                ),
                "preset": (
                    [CUSTOM, *_preset_names()],
                    {"default": CUSTOM, "tooltip": "custom: the inputs above. Any other replaces all of them."},
                ),
            },
            "optional": {
                "tolerance": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 0.5,
                        "step": 0.01,
                        "tooltip": "Above 0: every head keeps as many blocks as hold its measured error at this level, "
                        "such as 0.05, in place of one sparsity for all.",
                    },
                ),
                "replan": (
                    "INT",
                    {
                        "default": SparseConfig().replan,
                        "min": 1,
                        "max": 100,
                        "tooltip": "Above 1: tokens are sorted anew every so many sampler steps, not in every one. "
                        "Faster, a little further from full attention, and takes GPU memory.",
                    },
                ),
            },
        }

    def patch(self, model: Any, **inputs: Any) -> tuple[Any]:
        return (patch(model, config_of(**inputs)),)


class RectifiedAttentionReport:
    """What the last run of a patched model did, once the sampler's latent is there."""

    CATEGORY = CATEGORY
    DESCRIPTION = "What ran sparse, at which density, on which backend; what ran dense and why."
    FUNCTION = "report"
    RETURN_TYPES = ("IMAGE", "STRING", "LATENT")
    RETURN_NAMES = ("picture", "text", "latent")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "latent": ("LATENT", {"tooltip": "The sampler's, so that it is done."})}
        }

    def report(self, model: Any, latent: Any) -> dict[str, Any]:
        override = override_of(model)
        if override is None:
            raise ValueError("Rectified Attention Report: got a model without Rectified Attention; connect its output.")
        text = override.summary()
        image = torch.tensor(picture(override.seam.record, text), dtype=torch.float32)[None] / 255
        return {"ui": {"text": [text]}, "result": (image, text, latent)}


NODE_CLASS_MAPPINGS = {"RectifiedAttention": RectifiedAttention, "RectifiedAttentionReport": RectifiedAttentionReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RectifiedAttention": "Rectified Attention",
    "RectifiedAttentionReport": "Rectified Attention Report",
}
