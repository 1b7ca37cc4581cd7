"""Readers for models that pack several kinds of tokens into one sequence."""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..layout import TokenLayout
from .tokens import Grid, Inputs, image_grid, joint_text, layout_of, raster_grid, video_grid

Z_IMAGE_MULTIPLE = 32  # images and captions are filled up to a multiple of so many tokens
IDEOGRAM_IMAGE = 2  # in `indicator`: a token of the image that is made


def minimax_h3(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Video, keyframes and references can be tiled; text, with what it says of pictures, and audio stand alone."""
    sequence, video = len(inputs["position_ids"]), inputs["video_indices"].cpu()
    start, count = int(video[0]), len(video)
    grid = raster_grid(inputs["position_ids"][video]) if int(video[-1]) - start == count - 1 else None
    if grid is None:
        return (TokenLayout.of(sequence, video),)
    return (TokenLayout(sequence=sequence, spans=((start, start + count),), grid=grid, grid_start=start),)


def cosmos3(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Text and then videos and pictures, which can be tiled; sound and actions stand alone."""
    sequence, video = int(inputs["sequence_length"]), inputs["vision_sequence_indexes"].cpu()
    shapes, start = inputs["vision_token_shapes"], int(video[0])
    if len(shapes) > 1 or int(video[-1]) - start != len(video) - 1:
        return (TokenLayout.of(sequence, video),)
    t, h, w = shapes[0]
    return (TokenLayout(sequence=sequence, spans=((start, start + len(video)),), grid=(t, h, w), grid_start=start),)


def ideogram4(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Padding, text and then an image. Raises ValueError for several documents in one sequence."""
    image, documents = (inputs["indicator"] == IDEOGRAM_IMAGE).cpu(), inputs["segment_ids"].cpu()
    places = image[0].nonzero().flatten()
    of_image = documents[:, places]
    if (image != image[0]).any() or (of_image != of_image[:, :1]).any():
        raise ValueError(
            f"{type(model).__name__}: got images at other places in every sample, or of several documents in one; "
            "allowed: one document a sample, images at one place. Disable rectified attention for such calls."
        )
    grid = raster_grid(inputs["position_ids"][0, places.to(inputs["position_ids"].device)])
    start = int(places[0])
    if grid is None or start + len(places) != image.shape[1]:
        return (TokenLayout.of(image.shape[1], places),)
    return (TokenLayout.build(grid, start, text_first=start > 0),)


def flux3(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Text, image, references; before that some layers attend over the image alone and the references alone."""
    text, image = int(inputs["encoder_hidden_states"].shape[1]), image_grid(model, inputs)
    references = inputs.get("image_cond_hidden_states")
    if references is None:
        return layout_of(image, text, text_first=True), layout_of(image)
    tokens, others = int(inputs["hidden_states"].shape[1]), int(references.shape[1])
    alone = layout_of(tokens), layout_of(others)
    return layout_of(tokens + others, text, text_first=True), *alone


def motif_video(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Video and then text; in the decoder's layers the video that is made and the video as it was encoded."""
    grid = video_grid(model, inputs)
    config: Any = model.config
    decoder = (layout_of(2 * math.prod(grid)),) if config.num_decoder_layers else ()
    return layout_of(grid, joint_text("encoder_hidden_states", "image_embeds")(inputs)), *decoder


def framepack(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """History, video, and then what a picture says and text, which is cut to what is valid in a batch of one."""
    video = math.prod(video_grid(model, inputs))
    for name, patch in (("clean", (1, 2, 2)), ("history_2x", (2, 4, 4)), ("history_4x", (4, 8, 8))):
        latents, indices = inputs.get(f"latents_{name}"), inputs.get(f"indices_latents_{name}")
        if latents is not None and indices is not None:
            video += math.prod(-(-side // by) for side, by in zip(latents.shape[2:], patch, strict=True))
    mask = inputs["encoder_attention_mask"]
    words = int(mask.sum()) if len(mask) == 1 else int(mask.shape[1])
    return (layout_of(video, words + int(inputs["image_embeds"].shape[1])),)


def z_image(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """An image and then its caption; before that some layers attend over the image alone."""
    images, captions = inputs["x"], inputs["cap_feats"]
    if isinstance(images[0], list):
        return _omni(model, inputs)
    shapes = {_patches(image, inputs) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"{type(model).__name__}: got images of {sorted(shapes)} tokens in one batch; allowed: one size. Call it "
            "with one after the other, or disable rectified attention."
        )
    (grid,) = shapes
    filled = _filled(math.prod(grid)) - math.prod(grid)
    return layout_of(grid, filled + max(_filled(len(each)) for each in captions)), layout_of(grid, filled)


def _omni(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
    """Captions, references and the image, and what an encoder says of the references."""
    found = {_omni_lengths(inputs, i) for i in range(len(inputs["x"]))}
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__}: got samples with other captions or images in one batch; allowed: all alike in "
            "length. Call it with one after the other, or disable rectified attention."
        )
    ((captions, images, others),) = found
    edges = list(accumulate((_filled(each) for each in images), initial=0))
    spans = [(start, start + each) for start, each in zip(edges, images, strict=False) if each]
    joint = TokenLayout.of(captions + edges[-1] + others, [(captions + a, captions + b) for a, b in spans])
    return joint, TokenLayout.of(edges[-1], spans)


def _omni_lengths(inputs: Inputs, sample: int) -> tuple[int, tuple[int, ...], int]:
    captions = sum(_filled(len(each)) for each in inputs["cap_feats"][sample])
    images = tuple(0 if each is None else math.prod(_patches(each, inputs)) for each in inputs["x"][sample])
    seen = (inputs.get("siglip_feats") or [None])[sample]
    others = 0 if seen is None else sum(_filled(0 if each is None else each[..., 0].numel()) for each in seen)
    return captions, images, others


def _patches(image: torch.Tensor, inputs: Inputs) -> Grid:
    side = inputs.get("patch_size", 2)
    f, h, w = image.shape[1:]
    return f // inputs.get("f_patch_size", 1), h // side, w // side


def _filled(tokens: int) -> int:
    return max(1, -(-tokens // Z_IMAGE_MULTIPLE)) * Z_IMAGE_MULTIPLE
