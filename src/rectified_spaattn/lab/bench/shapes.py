"""The attention shapes of published models, by name, and what is run on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...config import SparseConfig

if TYPE_CHECKING:  # options are read and help is shown without it
    import torch

    from ...backends import Call
    from ...layout import TokenLayout
    from ...orders import Blocks

DTYPES = ("bfloat16", "float16", "float32")
_SMALL = 4096  # video tokens of a shape's small form

Tensors: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"
Watch = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


class BenchError(RuntimeError):
    """Something asked for cannot run here, or a result is wrong. Nothing was timed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Self-attention of one model, one sample. grid: (T, H, W) in tokens; text: text tokens in the same sequence.

    kv_heads: of keys and values; None: as many as of queries.
    """

    name: str
    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False
    heads: int
    kv_heads: int | None = None
    head_dim: int = 128

    @property
    def video(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def tokens(self) -> int:
        """S: video and text."""
        return self.video + self.text

    def small(self) -> "Shape":
        """The same kind of call with at most 4,096 video tokens and two heads, small enough for float64.

        The longest side is halved again and again, to an odd length, so that some tokens fill no whole block.
        """
        sides = list(self.grid)
        while sides[0] * sides[1] * sides[2] > _SMALL:
            longest = sides.index(max(sides))
            sides[longest] = sides[longest] // 2 | 1
        shared = None if self.kv_heads is None else 1
        return replace(self, grid=(sides[0], sides[1], sides[2]), heads=min(2, self.heads), kv_heads=shared)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="hunyuan-video", grid=(32, 45, 80), text=256, heads=24),
        Shape(name="wan-14b", grid=(21, 45, 80), heads=40),
        Shape(name="wan-1.3b-480p", grid=(21, 30, 52), heads=12),
        Shape(name="cogvideox1.5", grid=(11, 48, 85), text=226, text_first=True, heads=48, head_dim=64),
        Shape(name="flux-4096", grid=(1, 256, 256), text=512, text_first=True, heads=24),
        Shape(name="tiny", grid=(4, 8, 8), text=10, heads=2, head_dim=64),
    )
}
PEER_NAMES = ("flex", "sage", "sol-attn", "vsa")  # other publications' kernels; their rows are in peers.py
# What `doctor` checks: some blocks of either size, and 16 tokens that fill none; text behind the video.
SELF_CHECK = Shape(name="self-check", grid=(5, 13, 16), text=10, heads=2)
MODEL_SHAPES: tuple[str, ...] = tuple(name for name in SHAPES if name != "tiny")


class Case(NamedTuple):
    """A shape as it is run. config: what sparse attention runs with."""

    shape: Shape
    config: SparseConfig
    dtype: "torch.dtype"
    device: "torch.device"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def small(self) -> "Case":
        return self._replace(shape=self.shape.small())

    def config_of(self, variant: "Variant") -> SparseConfig:
        config = self.config.replace(precision=variant.precision)
        return config if variant.sparsity is None else config.replace(sparsity=variant.sparsity)

    def layout(self) -> "TokenLayout":
        from ...layout import TokenLayout

        return TokenLayout.build(self.shape.grid, self.shape.text, self.shape.text_first)

    def blocks(self) -> "Blocks":
        """With their tensors on the case's device."""
        from ...orders import blocks_of

        return blocks_of(self.layout(), self.config).on(self.device)

    def call(self, precision: str = "inputs") -> "Call":
        from ...backends import Call

        size = self.config.block_size
        return Call(self.device, self.dtype, self.shape.head_dim, size, self.shape.video // size, precision)

    def inputs(self, seed: int, sets: int = 1) -> list[Tensors]:
        """Sets of q [1, S, H, D] and k, v [1, S, kv_heads, D] of independent normal numbers."""
        import torch

        generator, shape = torch.Generator(self.device).manual_seed(seed), self.shape
        normal = partial(torch.randn, generator=generator, dtype=self.dtype, device=self.device)
        sizes = [(1, shape.tokens, n, shape.head_dim) for n in (shape.heads, *[shape.kv_heads or shape.heads] * 2)]
        return [(normal(sizes[0]), normal(sizes[1]), normal(sizes[2])) for _ in range(sets)]

    def smooth_inputs(self, seed: int) -> Tensors:
        """One set like those of `inputs`, of which something can be chosen: video tokens vary smoothly over the grid,
        with noise, and keys lie where their queries lie.
        """
        import torch

        generator, shape = torch.Generator(self.device).manual_seed(seed), self.shape
        normal = partial(torch.randn, generator=generator, device=self.device)
        key_heads = shape.kv_heads or shape.heads

        def field() -> torch.Tensor:
            coarse = normal(1, key_heads * shape.head_dim, *(-(-side // 4) for side in shape.grid))
            fine = torch.nn.functional.interpolate(coarse, shape.grid, mode="trilinear").flatten(2)
            return fine.view(1, key_heads, shape.head_dim, -1).permute(0, 3, 1, 2)

        def noisy(video: torch.Tensor) -> torch.Tensor:
            text = normal(1, shape.text, *video.shape[2:])
            both = [video + 0.3 * normal(video.shape), text]
            return torch.cat(both[::-1] if shape.text_first else both, dim=1).to(self.dtype)

        place = field()
        return noisy(place.repeat_interleave(shape.heads // key_heads, 2)), noisy(place), noisy(field())


class Variant(NamedTuple):
    """One kind of attention that is timed.

    kind: "dense", "sparse", "peer" or "removed" (a copy of v in its place); name: of the baseline, backend or peer.
    precision: as in SparseConfig.
    """

    kind: str
    name: str
    sparsity: float | None = None
    precision: str = "inputs"

    def __str__(self) -> str:
        return f"{self.kind} {self.title}" + ("" if self.sparsity is None else f" {self.sparsity!r}")

    @property
    def title(self) -> str:
        """The name, and the precision where it is not that of the inputs."""
        return self.name if self.precision == "inputs" else f"{self.name}, {self.precision}"


REMOVED = Variant("removed", "none")
