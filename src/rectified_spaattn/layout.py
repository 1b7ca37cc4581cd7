"""TokenLayout: what the model says of a sequence: which tokens can be tiled into blocks, and which stand alone."""

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral

import torch

Grid = tuple[int, int, int]
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The tokens of one sequence: those that can be tiled (video, images), and those that stand alone (text, audio).

    sequence    S, the number of all tokens
    spans       places in the sequence of the tokens that can be tiled: half-open, ascending, apart from each other
    grid        (T, H, W) in tokens, after patching, where the tokens that can be tiled lie in one; None: nowhere, and
                only an order that needs no places ("content") can tile them
    grid_start  place of the grid's first token; the others follow in raster order

    Make one with `build` or `of`. Raises ValueError for spans out of order or out of range.
    """

    sequence: int
    spans: tuple[Span, ...]
    grid: Grid | None = None
    grid_start: int = 0
    key: str = field(init=False, repr=False, compare=False)  # the fields, as the operator's schema carries them

    def __post_init__(self) -> None:
        start, end = 0, self.sequence
        if self.grid is not None:
            start, end = self.grid_start, self.grid_start + math.prod(self.grid)
        edges = [edge for span in self.spans for edge in span]
        inside = not edges or (start <= edges[0] and edges[-1] <= end <= self.sequence)
        filled = all(first < last for first, last in self.spans)
        if not inside or not filled or edges != sorted(set(edges)):
            raise ValueError(
                f"spans: got {self.spans}; allowed: half-open, ascending, apart from each other, within places {start} "
                f"to {end} of {self.sequence} tokens."
            )
        object.__setattr__(self, "key", repr([self.sequence, self.spans, self.grid, self.grid_start]))

    @staticmethod
    def build(grid: Grid, text: int = 0, text_first: bool = False) -> "TokenLayout":
        """N = T*H*W video tokens in raster order with `text` tokens, padding included, behind or before them.

        Raises TypeError or ValueError for a grid that is not three positive integers or a negative text length.
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
        sides = (int(grid[0]), int(grid[1]), int(grid[2]))
        video, start = math.prod(sides), int(text) if text_first else 0
        return TokenLayout(sequence=video + int(text), spans=((start, start + video),), grid=sides, grid_start=start)

    @staticmethod
    def of(sequence: int, tiled: Iterable[Span] | torch.Tensor) -> "TokenLayout":
        """Any tokens of a sequence, which need lie in no grid: for `order="content"`.

        tiled: the places that can be tiled, as half-open spans (start, end), or as an integer tensor of places.
        """
        places = tiled.flatten().tolist() if isinstance(tiled, torch.Tensor) else _places(tiled)
        return TokenLayout(sequence=sequence, spans=_spans(places))

    def without(self, places: Sequence[int]) -> "TokenLayout":
        """The same layout in which the tokens at `places` stand alone, as hidden ones must; the grid stays."""
        left = set(_places(self.spans)) - set(places)
        return TokenLayout(sequence=self.sequence, spans=_spans(left), grid=self.grid, grid_start=self.grid_start)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> "TokenLayout":
        """The layout whose `key` this is; cached."""
        sequence, spans, grid, grid_start = ast.literal_eval(key)
        return TokenLayout(sequence=sequence, spans=spans, grid=grid, grid_start=grid_start)

    @property
    def video(self) -> int:
        """N, the number of tokens that can be tiled."""
        return sum(last - first for first, last in self.spans)

    @property
    def text(self) -> int:
        """The number of tokens that stand alone: text, padding included, audio, and what must be exact."""
        return self.sequence - self.video

    @cached_property
    def video_places(self) -> torch.Tensor:
        """int64 [N]: places of the tokens that can be tiled, ascending; on the CPU."""
        return torch.tensor(_places(self.spans), dtype=torch.int64, device="cpu")

    @cached_property
    def text_places(self) -> torch.Tensor:
        """int64 [text]: places of the tokens that stand alone, ascending; on the CPU."""
        alone = torch.ones(self.sequence, dtype=torch.bool, device="cpu")
        alone[self.video_places] = False
        return alone.nonzero().flatten()

    @property
    def places(self) -> str:
        """Where the tokens that can be tiled lie, in words."""
        return f"{self.video} tokens of no grid" if self.grid is None else f"grid {self.grid}"

    def __str__(self) -> str:
        video = f"{self.video} tokens" if self.grid is None else "{}*{}*{} video".format(*self.grid)
        return f"{video} + {self.text} that stand alone = {self.sequence}"


def _places(spans: Iterable[Span]) -> list[int]:
    return [place for first, last in spans for place in range(first, last)]


def _spans(places: Iterable[int]) -> tuple[Span, ...]:
    """The fewest half-open spans that hold exactly these places."""
    spans: list[Span] = []
    for place in sorted(set(places)):
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return tuple(spans)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
