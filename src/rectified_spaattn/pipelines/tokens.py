"""How a transformer's tokens lie in the sequence, read from what its forward receives."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Grid = tuple[int, int, int]
Inputs = Mapping[str, Any]  # forward's arguments by name

HUNYUAN15_TEXT = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")


def video_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) in tokens of a video [B, C, T, H, W] that the model cuts into patches."""
    return _patched(model, inputs["hidden_states"].shape[2:])


def frames_first_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) in tokens of a video [B, T, C, H, W]."""
    t, _, h, w = inputs["hidden_states"].shape[1:]
    return _patched(model, (t, h, w))


def bidirectional_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """video_grid, where the model is not set to attend block-causally over the frames."""
    config: Any = model.config
    if config.num_frame_per_block > 1:
        raise ValueError(
            f"{type(model).__name__}: got num_frame_per_block={config.num_frame_per_block}, attention that is causal "
            "over blocks of frames; allowed: 1. Leave causal_block_size out, or disable rectified attention."
        )
    return video_grid(model, inputs)


def named_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) as forward's num_frames, height and width name it, or else as its video_coords [B, 3, N] do."""
    sides = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None not in sides:
        t, h, w = (int(side) for side in sides)  # type: ignore[arg-type]  # no None here
        return t, h, w
    coords = inputs.get("video_coords")
    if coords is None:
        raise ValueError(
            f"{type(model).__name__}: got neither num_frames, height and width nor video_coords; allowed: one of "
            "them, so that the grid of the tokens is known. Pass them to the transformer's forward."
        )
    return raster_grid(coords[0].transpose(0, 1), f"{type(model).__name__}: video_coords")


def image_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(1, H, W) from img_ids, [N, 3 or 4], batched or not: frame, row, column (and layer) of each token."""
    name = f"{type(model).__name__}: img_ids"
    if inputs.get("kv_cache_mode") is not None:
        raise ValueError(
            f"{type(model).__name__}: got kv_cache_mode={inputs['kv_cache_mode']!r}, reference images with a cache; "
            "allowed: None, one image and the text. Disable rectified attention for this call."
        )
    ids = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    t, h, w = raster_grid(ids[:, :3], name)
    if t != 1 or (ids.shape[1] > 3 and bool((ids[:, 3] != ids[0, 3]).any())):
        raise ValueError(_not_raster(name, len(ids), "more than one image"))
    return t, h, w


def single_shape_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) from img_shapes, one (T, H, W) a sample, each maybe in a list; all samples alike."""
    shapes = [[tuple(shape)] if isinstance(shape[0], int) else list(shape) for shape in inputs["img_shapes"]]
    if any(each != shapes[0] for each in shapes) or len(shapes[0]) != 1:
        raise ValueError(
            f"{type(model).__name__}: got img_shapes {inputs['img_shapes']}; allowed: one image a sample, all of one "
            "size. Reference images (editing) and layers have no place in one grid: disable rectified attention."
        )
    t, h, w = (int(side) for side in shapes[0][0])
    return t, h, w


def raster_grid(places: torch.Tensor, name: str) -> Grid:
    """The grid whose tokens lie at `places` [N, 3], (t, h, w) each, in raster order. Waits for the device.

    Coordinates may be rounded (bfloat16 holds whole numbers to 256), so they are counted, not read.
    Raises ValueError where no grid has its tokens there.
    """
    places = places.detach().cpu()
    count = len(places)
    w = _period(places[:, 2])
    h = _period(places[::w, 1])
    t = count // (w * h)
    if t * h * w != count:
        raise ValueError(_not_raster(name, count, f"rows of {w} tokens do not fill it"))
    cube = places.view(t, h, w, 3)
    frames, rows, columns = cube[:, 0, 0, 0], cube[0, :, 0, 1], cube[0, 0, :, 2]
    expected = torch.broadcast_tensors(frames[:, None, None], rows[:, None], columns)
    ascending = (frames.diff() > 0).all() and (rows.diff() >= 0).all() and (columns.diff() >= 0).all()
    if not ascending or not torch.equal(cube, torch.stack(expected, dim=-1)):
        raise ValueError(_not_raster(name, count, "their order is not frame, row, column"))
    return t, h, w


def joint_text(*names: str) -> Callable[[Inputs], int]:
    """Number of text tokens beside the video: the lengths of the named inputs [B, L, C], added up."""
    return lambda inputs: sum(int(inputs[name].shape[1]) for name in names)


def hunyuan15_padding(inputs: Inputs) -> int:
    """HunyuanVideo 1.5 puts valid text first: how many tokens are padding in every row. Waits for the device."""
    valid = inputs["encoder_attention_mask"].bool().sum(1) + inputs["encoder_attention_mask_2"].bool().sum(1)
    image = inputs["image_embeds"]
    image_tokens = int(image.shape[1]) * (image != 0).any()  # without an image all of them are padding
    return joint_text(*HUNYUAN15_TEXT)(inputs) - int(valid.max() + image_tokens)


def no_text(inputs: Inputs) -> int:
    """Text is seen by cross-attention alone, or none of it is padding."""
    return 0


def _patched(model: nn.Module, lengths: Any) -> Grid:
    config: Any = model.config
    size = config.patch_size
    patch = tuple(size) if isinstance(size, tuple | list) else (config.patch_size_t or 1, size, size)
    t, h, w = (int(length) // side for length, side in zip(lengths, patch, strict=True))
    return t, h, w


def _period(values: torch.Tensor) -> int:
    """After how many entries the first value comes again; the length where it never does."""
    again = (values[1:] == values[0]).nonzero()
    return int(again[0]) + 1 if len(again) else len(values)


def _not_raster(name: str, count: int, why: str) -> str:
    return (
        f"{name}: got {count} tokens that are not one raster-ordered grid ({why}); allowed: one image or video, row by "
        "row. Reference, keyframe or edited images among the tokens are not supported: disable rectified attention."
    )
