"""The attention shapes of published models, by name."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..config import Rectify
from ..layout import TokenLayout

_SMALL = 4096  # video tokens of a shape's small form


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Self-attention of one model, one sample. grid: (T, H, W) in tokens; text: text tokens in the same sequence."""

    name: str
    grid: tuple[int, int, int]
    text: int
    text_first: bool
    heads: int
    head_dim: int

    @property
    def video(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def tokens(self) -> int:
        """S: video and text."""
        return self.video + self.text

    def layout(self, block_size: int, order: str = "gilbert") -> TokenLayout:
        return TokenLayout.build(self.grid, self.text, self.text_first, block_size, order)

    def small(self) -> "Shape":
        """The same kind of call with at most 4,096 video tokens and two heads, small enough for float64.

        The longest side is halved again and again, to an odd length, so that some tokens fill no whole block.
        """
        sides = list(self.grid)
        while sides[0] * sides[1] * sides[2] > _SMALL:
            longest = sides.index(max(sides))
            sides[longest] = sides[longest] // 2 | 1
        return replace(self, grid=(sides[0], sides[1], sides[2]), heads=min(2, self.heads))


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="hunyuan-video", grid=(32, 45, 80), text=256, text_first=False, heads=24, head_dim=128),
        Shape(name="wan-14b", grid=(21, 45, 80), text=0, text_first=False, heads=40, head_dim=128),
        Shape(name="wan-1.3b-480p", grid=(21, 30, 52), text=0, text_first=False, heads=12, head_dim=128),
        Shape(name="cogvideox1.5", grid=(11, 48, 85), text=226, text_first=True, heads=48, head_dim=64),
        Shape(name="flux-4096", grid=(1, 256, 256), text=512, text_first=True, heads=24, head_dim=128),
        Shape(name="tiny", grid=(4, 8, 8), text=10, text_first=False, heads=2, head_dim=64),
    )
}
MODEL_SHAPES: tuple[str, ...] = tuple(name for name in SHAPES if name != "tiny")


class Case(NamedTuple):
    """A shape as it is run."""

    shape: Shape
    block_size: int
    dtype: torch.dtype
    device: torch.device
    rectify: Rectify = "ipar+gapr"
    order: str = "gilbert"

    def layout(self) -> TokenLayout:
        return self.shape.layout(self.block_size, self.order)

    def inputs(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [1, S, H, D] of independent normal numbers. generator: on the case's device."""
        size = (1, self.shape.tokens, self.shape.heads, self.shape.head_dim)
        q, k, v = (torch.randn(size, generator=generator, dtype=self.dtype, device=self.device) for _ in "qkv")
        return q, k, v
