"""How a transformer's tokens lie in the sequence, read from what its forward receives.

A reader of places says where the tokens that can be tiled lie: a grid (T, H, W), or how many they are where they lie in
none, as an image does with references beside it; only order="content" can tile those.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..layout import TokenLayout

Grid = tuple[int, int, int]
Inputs = Mapping[str, Any]  # forward's arguments by name
Places = Callable[[nn.Module, Inputs], Grid | int]
Layouts = Callable[[nn.Module, Inputs], tuple[TokenLayout, ...]]

HUNYUAN15_TEXT = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")


def joint(places: Places, text: Callable[[Inputs], int] | None = None, text_first: bool = False) -> Layouts:
    """One layout: tokens that can be tiled, and behind or before them what `text` counts, padding included."""

    def read(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
        return (layout_of(places(model, inputs), text(inputs) if text else 0, text_first),)

    return read


def joint_and_alone(places: Places, text: Callable[[Inputs], int], text_first: bool = False) -> Layouts:
    """Two layouts: as `joint`, and without the text, where some layers attend over the image alone."""

    def read(model: nn.Module, inputs: Inputs) -> tuple[TokenLayout, ...]:
        found = places(model, inputs)
        return layout_of(found, text(inputs), text_first), layout_of(found)

    return read


def layout_of(places: Grid | int, text: int = 0, text_first: bool = False) -> TokenLayout:
    """Tokens that can be tiled, in a grid or so many in none, and `text` tokens behind or before them."""
    if not isinstance(places, int):
        return TokenLayout.build(places, text, text_first and text > 0)
    start = text if text_first else 0
    return TokenLayout.of(text + places, [(start, start + places)])


def video_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) in tokens of a video [B, C, T, H, W] that the model cuts into patches."""
    return _patched(model, inputs["hidden_states"].shape[2:])


def frames_first_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) in tokens of a video [B, T, C, H, W]."""
    t, _, h, w = inputs["hidden_states"].shape[1:]
    return _patched(model, (t, h, w))


def channels_last_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(T, H, W) in tokens of a video [B, T, H, W, C]."""
    return _patched(model, inputs["hidden_states"].shape[1:4])


def picture_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """(1, H, W) in tokens of images [B, C, H, W], or (T, H, W) of [B, C, T, H, W]."""
    sides = inputs["hidden_states"].shape[2:]
    return _patched(model, sides if len(sides) == 3 else (1, *sides))


def items_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """video_grid, or of several pictures [B, N, C, T, H, W] the number of their tokens."""
    sizes = inputs["hidden_states"].shape
    grid = _patched(model, sizes[-3:])
    return grid if len(sizes) == 5 else int(sizes[1]) * math.prod(grid)


def packed_count(model: nn.Module, inputs: Inputs) -> int:
    """How many tokens of pictures [B, N, ...] there are, filled up to the longest sample, which the mask tells."""
    return int(inputs["hidden_states"].shape[1])


def fractal_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """As channels_last_grid, where Kandinsky 5 does not reorder tokens for its own sparse attention, NABLA."""
    grid = channels_last_grid(model, inputs)
    own = inputs.get("sparse_params")
    return math.prod(grid) if own is not None and own["to_fractal"] else grid


def reordered_grid(model: nn.Module, inputs: Inputs) -> int:
    """As channels_last_grid, where the model always reorders tokens into squares."""
    return math.prod(channels_last_grid(model, inputs))


def bidirectional_grid(model: nn.Module, inputs: Inputs) -> Grid:
    """video_grid, where the model is not set to attend block-causally over the frames."""
    config: Any = model.config
    if config.num_frame_per_block > 1:
        raise ValueError(
            f"{type(model).__name__}: got num_frame_per_block={config.num_frame_per_block}, attention that is causal "
            "over blocks of frames; allowed: 1. Leave causal_block_size out, or disable rectified attention."
        )
    return video_grid(model, inputs)


def named_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """(T, H, W) as forward's num_frames, height and width name it, or else as its video_coords [B, 3, N] do.

    Neither fits where keyframes stand among the tokens.
    """
    tokens = int(inputs["hidden_states"].shape[1])
    sides = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None not in sides:
        t, h, w = (int(side) for side in sides)  # type: ignore[arg-type]  # no None here
        return (t, h, w) if t * h * w == tokens else tokens
    coords = inputs.get("video_coords")
    if coords is None:
        raise ValueError(
            f"{type(model).__name__}: got neither num_frames, height and width nor video_coords; allowed: one of "
            "them, so that the grid of the tokens is known. Pass them to the transformer's forward."
        )
    starts = coords[..., 0] if coords.ndim == 4 else coords  # LTX-2 says where each token ends, too
    return raster_grid(starts[0].transpose(0, 1)) or tokens


def image_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """(1, H, W) from img_ids, [N, 3 or 4], batched or not: frame, row, column (and layer) of each token."""
    if inputs.get("kv_cache_mode") is not None:
        raise ValueError(
            f"{type(model).__name__}: got kv_cache_mode={inputs['kv_cache_mode']!r}, reference images with a cache; "
            "allowed: None. Pass the references with the image, or disable rectified attention for this call."
        )
    ids = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    grid = raster_grid(ids[:, :3])
    one_layer = ids.shape[1] == 3 or not bool((ids[:, 3] != ids[0, 3]).any())
    return grid if grid is not None and grid[0] == 1 and one_layer else len(ids)


def positions_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """(1, H, W) from position_ids [text + N, 3] of the text and then the image."""
    text = int(inputs["encoder_hidden_states"].shape[1])
    ids = inputs["position_ids"][text:]
    return raster_grid(ids) or len(ids)


def shapes_grid(model: nn.Module, inputs: Inputs) -> Grid | int:
    """(T, H, W) from img_shapes, one (T, H, W) a sample, each maybe in a list; none where there are several."""
    shapes = [[tuple(shape)] if isinstance(shape[0], int) else list(shape) for shape in inputs["img_shapes"]]
    if any(each != shapes[0] for each in shapes):
        raise ValueError(
            f"{type(model).__name__}: got img_shapes {inputs['img_shapes']}; allowed: the same images in every sample. "
            "Call it with one sample after the other, or disable rectified attention."
        )
    if len(shapes[0]) > 1:
        return sum(math.prod(shape) for shape in shapes[0])
    t, h, w = (int(side) for side in shapes[0][0])
    return t, h, w


def raster_grid(places: torch.Tensor) -> Grid | None:
    """The grid whose tokens lie at `places` [N, 3], (t, h, w) each, in raster order. Waits for the device.

    Coordinates may be rounded (bfloat16 holds whole numbers to 256), so they are counted, not read.
    None where no grid has its tokens there.
    """
    places = places.detach().cpu()
    count = len(places)
    w = _period(places[:, 2])
    h = _period(places[::w, 1])
    t = count // (w * h)
    if t * h * w != count:
        return None
    cube = places.view(t, h, w, 3)
    frames, rows, columns = cube[:, 0, 0, 0], cube[0, :, 0, 1], cube[0, 0, :, 2]
    expected = torch.broadcast_tensors(frames[:, None, None], rows[:, None], columns)
    ascending = (frames.diff() > 0).all() and (rows.diff() >= 0).all() and (columns.diff() >= 0).all()
    return (t, h, w) if ascending and torch.equal(cube, torch.stack(expected, dim=-1)) else None


def joint_text(*names: str) -> Callable[[Inputs], int]:
    """Number of text tokens beside the video: the lengths of the named inputs [B, L, C], added up; None counts 0."""
    return lambda inputs: sum(int(inputs[name].shape[1]) for name in names if inputs.get(name) is not None)


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
    patch = tuple(size) if isinstance(size, tuple | list) else (getattr(config, "patch_size_t", None) or 1, size, size)
    t, h, w = (int(length) // side for length, side in zip(lengths, (1, *patch)[-3:], strict=True))
    return t, h, w


def _period(values: torch.Tensor) -> int:
    """After how many entries the first value comes again; the length where it never does."""
    again = (values[1:] == values[0]).nonzero()
    return int(again[0]) + 1 if len(again) else len(values)
