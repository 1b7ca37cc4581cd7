"""TokenLayout: which tokens are tiled into blocks, in which order, and which stand alone."""

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product

import torch

from .config import check_block_size
from .curve import CONTENT, ORDERS


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLayout:
    """The tokens of one sequence: N = T*H*W video tokens in raster order with `text` tokens before or after them.

    grid         (T, H, W) in tokens, after patching
    text         number of text tokens, padding included
    text_first   True where the text stands before the video
    block_size   b, tokens a block
    curve        name of the order
    num_blocks   nb = N // b tiled blocks
    order        int64 [N], raster index of the video token at each position of the curve
    inverse      int64 [N], position on the curve of each raster index
    neighbours   bool [nb, nb], blocks that touch in 3-D (26-neighbourhood of their tokens), themselves included
    first_frame  bool [nb], blocks that hold a token of frame 0
    tiled        int64 [nb*b], place in the sequence of every tiled token, block after block
    isolated     int64 [N - nb*b + text], place in the sequence of every other token: leftover video, then text

    Tensors live on the CPU; `on(device)` gives the same layout with its index tensors there. Build with
    `TokenLayout.build`, which caches by its arguments.
    """

    grid: tuple[int, int, int]
    text: int
    text_first: bool
    block_size: int
    curve: str
    order: torch.Tensor
    inverse: torch.Tensor
    neighbours: torch.Tensor
    first_frame: torch.Tensor
    tiled: torch.Tensor
    isolated: torch.Tensor

    @staticmethod
    def build(
        grid: tuple[int, int, int],
        text: int = 0,
        text_first: bool = False,
        block_size: int = 128,
        order: str = "gilbert",
    ) -> "TokenLayout":
        """A cached layout.

        Raises TypeError or ValueError for a grid that is not three positive integers, a negative text length, a block
        size that is no multiple of 16, or an unknown order.
        """
        if not isinstance(grid, tuple | list) or len(grid) != 3 or not all(_is_int(side) for side in grid):
            raise TypeError(f"grid: got {grid!r}; allowed: (T, H, W), three integers counted in tokens.")
        if min(grid) < 1:
            raise ValueError(f"grid: got {grid}; allowed: every side 1 or more.")
        if not _is_int(text):
            raise TypeError(f"text: got {text!r}; allowed: the number of text tokens, an integer.")
        if text < 0:
            raise ValueError(f"text: got {text}; allowed: 0 or more.")
        if not isinstance(text_first, bool):
            raise TypeError(f"text_first: got {text_first!r}; allowed: True or False.")
        check_block_size(block_size)
        if order not in ORDERS:
            raise ValueError(f"order: got {order!r}; allowed: one of {list(ORDERS)}.")
        return _build((int(grid[0]), int(grid[1]), int(grid[2])), int(text), text_first, block_size, order)

    @property
    def num_blocks(self) -> int:
        return self.inverse.numel() // self.block_size

    @property
    def by_content(self) -> bool:
        """Whether a call sorts its tiled tokens, head by head; `tiled` then says which they are, not where."""
        return self.curve == CONTENT

    @property
    def video(self) -> int:
        """N, the number of video tokens."""
        return self.inverse.numel()

    @property
    def sequence(self) -> int:
        """S, the number of all tokens."""
        return self.video + self.text

    @property
    def leftover(self) -> int:
        """Video tokens that fill no whole block; they come first in `isolated`."""
        return self.video - self.num_blocks * self.block_size

    @cached_property
    def places(self) -> torch.Tensor:
        """int32 [rows]: place in the sequence of tiled and then isolated tokens, -1 up to a whole number of blocks."""
        places = torch.cat([self.tiled, self.isolated])
        return torch.nn.functional.pad(places, (0, -len(places) % self.block_size), value=-1).int()

    def on(self, device: torch.device) -> "TokenLayout":
        """The same layout with its tensors on `device`; cached."""
        if device.type == "cpu":
            return self
        if device not in self._moved:
            names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), torch.Tensor)]
            self._moved[device] = replace(self, **{name: getattr(self, name).to(device) for name in names})
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, "TokenLayout"]:
        return {}


@lru_cache(maxsize=64)
def _build(grid: tuple[int, int, int], text: int, text_first: bool, block_size: int, order: str) -> TokenLayout:
    curve = torch.tensor(ORDERS[order](grid, block_size), dtype=torch.int64, device="cpu")
    video = curve.numel()
    inverse = torch.empty_like(curve)
    inverse[curve] = torch.arange(video, device="cpu")
    num_blocks = video // block_size
    block_of = inverse // block_size
    block_of[block_of >= num_blocks] = -1  # leftover tokens belong to no block
    first_frame = torch.zeros(num_blocks, dtype=torch.bool, device="cpu")
    in_frame_0 = block_of[: grid[1] * grid[2]]
    first_frame[in_frame_0[in_frame_0 >= 0]] = True

    video_start = text if text_first else 0
    text_start = 0 if text_first else video
    places = curve + video_start
    return TokenLayout(
        grid=grid,
        text=text,
        text_first=text_first,
        block_size=block_size,
        curve=order,
        order=curve,
        inverse=inverse,
        neighbours=_touching(block_of.view(grid), num_blocks),
        first_frame=first_frame,
        tiled=places[: num_blocks * block_size],
        isolated=torch.cat([places[num_blocks * block_size :], text_start + torch.arange(text, device="cpu")]),
    )


def _touching(block_of: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """bool [nb, nb]: blocks with tokens at most one step apart along every axis. block_of: [T, H, W], -1 for none."""
    touching = torch.eye(num_blocks, dtype=torch.bool, device="cpu")
    half_space = [offset for offset in product((0, 1), (-1, 0, 1), (-1, 0, 1)) if offset > (0, 0, 0)]
    for offset in half_space:
        near, far = block_of, block_of
        for axis, step in enumerate(offset):
            length = max(block_of.shape[axis] - abs(step), 0)
            near = near.narrow(axis, max(-step, 0) if length else 0, length)
            far = far.narrow(axis, max(step, 0) if length else 0, length)
        pairs = (near >= 0) & (far >= 0)
        touching[near[pairs], far[pairs]] = True
    return touching | touching.T


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
