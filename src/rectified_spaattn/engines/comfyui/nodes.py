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


def _input(
    kind: str | list[str], default: Any, tooltip: str, **limits: float
) -> tuple[str | list[str], dict[str, Any]]:
    """One input as ComfyUI takes it. kind: a type, or the words to choose from."""
    return kind, {"default": default, "tooltip": tooltip, **limits}


class RectifiedAttention:
    """Model in, model out: its video self-attention runs block-sparse and rectified."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Makes the self-attention of video and image transformers block-sparse and repairs what that breaks."
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        default, percent = SparseConfig(), {"min": 0.0, "max": 99.0, "step": 1.0}
        required = {
            "model": ("MODEL",),
            "sparsity": _input(
                "FLOAT",
                default.sparsity,
                "Fraction of the attention blocks that may be dropped. 0 is full attention.",
                min=0.0,
                max=0.99,
                step=0.01,
            ),
            "mode": _input(
                list(MODES),
                default.rectify,
                "query+slope: the default. row+slope, row: a little faster, further from full attention. paper: arXiv "
                "2511.19835 on blocks in space. none: plain block-sparse.",
            ),
            "dense_first": _input(
                "FLOAT", 10.0, "Percent of the sampler's first steps with full attention.", **percent
            ),
            "dense_last": _input("FLOAT", 0.0, "Percent of the sampler's last steps with full attention.", **percent),
            "dense_blocks": _input("STRING", "", "Numbers of the blocks that keep full attention, such as 0, 1."),
            "preset": _input(
                [CUSTOM, *_preset_names()], CUSTOM, "custom: the inputs above. Any other replaces all of them."
            ),
        }
        optional = {
            "tolerance": _input(
                "FLOAT",
                0.0,
                "Above 0: every head keeps as many blocks as hold its measured error at this level, such as 0.05, in "
                "place of one sparsity for all.",
                min=0.0,
                max=0.5,
                step=0.01,
            ),
            "replan": _input(
                "INT",
                default.replan,
                "Above 1: tokens are sorted anew every so many sampler steps, not in every one. Faster, a little "
                "further from full attention, and takes GPU memory.",
                min=1,
                max=100,
            ),
        }
        return {"required": required, "optional": optional}

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
