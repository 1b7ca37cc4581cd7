"""One transformer as `bench model` builds it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .shapes import Shape

Grid = tuple[int, int, int]
Make = Callable[..., Any]  # make(*shape) -> normal numbers on the device, in the dtype
Inputs = Callable[["Model", Grid, Make], dict[str, Any]]


def _heads(shape: Shape) -> dict[str, Any]:
    return {"num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One transformer, the video it is timed on, and how a denoising run uses it.

    transformer  name of the diffusers class; config: its arguments but for heads and numbers of layers
    shape        the self-attention call of one sample
    stride       frames, and pixels down and across, of one token, of the VAE and the patches; 0 frames: no such rule
    heads        the arguments of the class that say how many heads of which size
    unit         layers of each kind in one unit; units: how many units the whole model has, in the order of the layers
    inputs       arguments of one forward at a grid of tokens
    batch        samples a forward; calls: forwards a step (guidance as two calls, as one batch, or embedded)
    preset       whose schedule a run follows; steps: denoising steps of a run
    paper        sparsity -> published speed-up of a run; paper_composed: with TeaCache, None where none is published
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    shape: Shape
    stride: Grid = (4, 16, 16)
    heads: Callable[[Shape], dict[str, Any]] = _heads
    unit: Mapping[str, int] = field(default_factory=lambda: {"num_layers": 1})
    units: int
    inputs: Inputs
    preset: str
    batch: int = 1
    calls: int = 1
    steps: int = 50
    paper: Mapping[float, float] = field(default_factory=dict)
    paper_composed: float | None = None

    @property
    def layers_a_unit(self) -> int:
        return sum(self.unit.values())

    @property
    def layers(self) -> int:
        return self.units * self.layers_a_unit

    def grid(self, height: int | None, width: int | None, frames: int | None) -> Grid:
        """Of the tokens of a video; what is None is as in `shape`. Raises ValueError for sizes that do not fit."""
        (t, h, w), (a_token, down, across) = self.shape.grid, self.stride
        for name, size, pixels in (("height", height, down // 2), ("width", width, across // 2)):
            if size is not None and (size < 1 or size % pixels):
                raise ValueError(f"{name}: got {size}; allowed for {self.name}: a multiple of {pixels}.")
        if frames is not None and not a_token:
            raise ValueError(f"frames: got {frames}; allowed for {self.name}: none. Its published number is taken.")
        if frames is not None:
            t = math.ceil(((frames - 1) // a_token + 1) / self.config.get("patch_size_t", 1))
        return (
            t,
            h if height is None else math.ceil(height / down),
            w if width is None else math.ceil(width / across),
        )

    def arguments(self, units: int) -> dict[str, Any]:
        """Arguments of the class for a model of so many units."""
        layers = {kind: count * units for kind, count in self.unit.items()}
        return {**self.config, **self.heads(self.shape), **layers}
