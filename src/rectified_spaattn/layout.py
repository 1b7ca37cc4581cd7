"""TokenLayout: what the model says of a sequence: which tokens can be tiled into blocks, and which stand alone."""

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from numbers import Integral
from typing import Literal, get_args

import torch

Grid = tuple[int, int, int]
Span = tuple[int, int]
TextSees = Literal["all", "text", "causal text"]


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The tokens of one sequence: those that can be tiled (video, images), and those that stand alone (text, audio).

    sequence    S, the number of all tokens
    spans       places in the sequence of the tokens that can be tiled: half-open, ascending, apart from each other
    grid        (T, H, W) in tokens, after patching, where the tokens that can be tiled lie in one; None: nowhere, and
                only an order that needs no places ("content") can tile them
    grid_start  place of the grid's first token; the others follow in raster order
    padding     how many tokens at the end take no part: no keys, and zeros as output
    pieces      half-open spans of all these places in the order in which they lie in q, k, v, where the sequence was
                cut in pieces; empty: as they are
    apart       places, like `spans`, of tokens that stand alone and attend to each other only; all others, and so all
                that can be tiled, attend to every token
    causal      tokens apart attend to those before them and to themselves only

    Make one with `build` or `of`. Raises ValueError for spans or pieces out of order or out of range.
    """

    sequence: int
    spans: tuple[Span, ...]
    grid: Grid | None = None
    grid_start: int = 0
    padding: int = 0
    pieces: tuple[Span, ...] = ()
    apart: tuple[Span, ...] = ()
    causal: bool = False
    key: str = field(init=False, repr=False, compare=False)  # the fields, as the operator's schema carries them

    def __post_init__(self) -> None:
        start, end = 0, self.sequence - self.padding
        if self.grid is not None:
            start, end = self.grid_start, self.grid_start + math.prod(self.grid)
        _check_spans("spans", self.spans, start, end, self.sequence - self.padding)
        _check_spans("apart", self.apart, 0, self.sequence - self.padding, self.sequence)
        both = set(_places(self.spans)) & set(_places(self.apart)) if self.apart else set()
        if both:
            raise ValueError(
                f"apart: got {self.apart}, of which {len(both)} can be tiled; allowed: tokens that stand alone."
            )
        ends = [0, *(last for _, last in sorted(self.pieces))]
        starts = [first for first, _ in sorted(self.pieces)] + [self.sequence]
        if self.pieces and starts != ends:
            raise ValueError(f"pieces: got {self.pieces}; allowed: each of the {self.sequence} places in one of them.")
        object.__setattr__(self, "key", repr([getattr(self, name) for name in _KEPT]))

    @staticmethod
    def build(grid: Grid, text: int = 0, text_first: bool = False, text_sees: TextSees = "all") -> "TokenLayout":
        """N = T*H*W video tokens in raster order with `text` tokens, padding included, behind or before them.

        text_sees: what text tokens attend to: "all" tokens, "text" only, or "causal text", those before them and
        themselves. Video tokens attend to all.
        Raises TypeError or ValueError for a grid that is not three positive integers, a negative text length or another
        word.
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
        if text_sees not in get_args(TextSees):
            raise ValueError(f"text_sees: got {text_sees!r}; allowed: one of {list(get_args(TextSees))}.")
        sides = (int(grid[0]), int(grid[1]), int(grid[2]))
        video, start = math.prod(sides), int(text) if text_first else 0
        words = (0, start) if text_first else (video, video + int(text))
        return TokenLayout(
            sequence=video + int(text),
            spans=((start, start + video),),
            grid=sides,
            grid_start=start,
            apart=(words,) if text and text_sees != "all" else (),
            causal=bool(text) and text_sees == "causal text",
        )

    @staticmethod
    def of(sequence: int, tiled: Iterable[Span] | torch.Tensor) -> "TokenLayout":
        """Any tokens of a sequence, which need lie in no grid: for `order="content"`.

        tiled: the places that can be tiled, as half-open spans (start, end), or as an integer tensor of places.
        """
        places = tiled.flatten() if isinstance(tiled, torch.Tensor) else _places(tiled)
        return TokenLayout(sequence=sequence, spans=_spans(places))

    def without(self, places: Sequence[int]) -> "TokenLayout":
        """The same layout in which the tokens at `places` stand alone, as hidden ones must; the grid stays."""
        left = set(_places(self.spans)) - set(places)
        return replace(self, spans=_spans(left))

    def cut(self, streams: Sequence[int], ranks: int) -> "TokenLayout":
        """The same layout where each of `ranks` processes had an equal part of every stream, one after the other.

        streams: lengths that the sequence consists of, text and video, say; each is cut as torch.tensor_split does.
        """
        return _cut(self, tuple(streams), ranks)

    def padded(self, padding: int) -> "TokenLayout":
        """The same layout in which so many tokens at the end take no part."""
        kept = (at for at in _places(self.apart) if at < self.sequence - padding)
        return replace(self, padding=padding, apart=_spans(kept))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> "TokenLayout":
        """The layout whose `key` this is; cached."""
        return TokenLayout(**dict(zip(_KEPT, ast.literal_eval(key), strict=True)))

    @property
    def video(self) -> int:
        """N, the number of tokens that can be tiled."""
        return sum(last - first for first, last in self.spans)

    @property
    def text(self) -> int:
        """The number of tokens that stand alone: text, audio, and what must be exact."""
        return self.sequence - self.padding - self.video

    @cached_property
    def video_tokens(self) -> torch.Tensor:
        """int64 [N]: which tokens can be tiled, ascending; on the CPU."""
        return places_of(self.spans)

    @cached_property
    def text_tokens(self) -> torch.Tensor:
        """int64 [text]: which tokens stand alone, ascending; on the CPU."""
        alone = torch.ones(self.sequence - self.padding, dtype=torch.bool, device="cpu")
        alone[self.video_tokens] = False
        return alone.nonzero().flatten()

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 [S]: where in q, k, v every token lies; on the CPU."""
        return self.token.argsort()

    @cached_property
    def token(self) -> torch.Tensor:
        """int64 [S]: which token lies in every place of q, k, v; on the CPU."""
        return places_of(self.pieces or ((0, self.sequence),))

    @cached_property
    def video_places(self) -> torch.Tensor:
        """int64 [N]: where in q, k, v the tokens that can be tiled lie, token after token; on the CPU."""
        return self.place[self.video_tokens]

    @cached_property
    def text_places(self) -> torch.Tensor:
        """int64 [text]: where in q, k, v the tokens that stand alone lie, token after token; on the CPU."""
        return self.place[self.text_tokens]

    @property
    def places(self) -> str:
        """Where the tokens that can be tiled lie, in words."""
        return f"{self.video} tokens of no grid" if self.grid is None else f"grid {self.grid}"

    @property
    def apart_text(self) -> tuple[Span, ...]:
        """`apart` as places among the tokens that stand alone."""
        return tuple((self._alone_before(first), self._alone_before(last)) for first, last in self.apart)

    def _alone_before(self, place: int) -> int:
        return place - sum(max(0, min(last, place) - first) for first, last in self.spans)

    def __str__(self) -> str:
        video = f"{self.video} tokens" if self.grid is None else "{}*{}*{} video".format(*self.grid)
        among = sum(last - first for first, last in self.apart)
        only = f" ({among} of them attend {'causally ' if self.causal else ''}to each other only)" if among else ""
        return f"{video} + {self.text} that stand alone{only} = {self.sequence}"


def masked_layout(valid: torch.Tensor, layout: TokenLayout) -> tuple[TokenLayout, torch.Tensor]:
    """A layout in which hidden video tokens stand alone, and bool [B, text]: which of those that do are valid.

    valid: bool [B, S], token after token. Waits for the device.
    """
    tokens = layout.video_tokens
    hidden = (~valid[:, tokens.to(valid.device)]).any(0).cpu()
    masked = layout.without(tokens[hidden].tolist()) if hidden.any() else layout
    return masked, valid[:, masked.text_tokens.to(valid.device)]


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are one part of one storage: a view of a mask that is made anew for every layer is the same mask."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _check_spans(name: str, spans: tuple[Span, ...], start: int, end: int, sequence: int) -> None:
    edges = [edge for span in spans for edge in span]
    inside = not edges or (start <= edges[0] and edges[-1] <= end <= sequence)
    filled = all(first < last for first, last in spans)
    if not inside or not filled or edges != sorted(set(edges)):
        raise ValueError(
            f"{name}: got {spans}; allowed: half-open, ascending, apart from each other, within places {start} to "
            f"{end} of {sequence} tokens."
        )


def places_of(spans: Iterable[Span]) -> torch.Tensor:
    """int64 [n]: the places that half-open spans hold, in their order; on the CPU."""
    return torch.tensor(_places(spans), dtype=torch.int64, device="cpu")


_KEPT = tuple(each.name for each in fields(TokenLayout) if each.init)


@lru_cache(maxsize=64)
def _cut(layout: TokenLayout, streams: tuple[int, ...], ranks: int) -> TokenLayout:
    starts = list(accumulate(streams, initial=0))
    if starts[-1] != layout.sequence:
        raise ValueError(f"streams: got {list(streams)}; allowed: lengths that add up to {layout.sequence}.")
    pieces: list[Span] = []
    for rank in range(ranks):
        for start, length in zip(starts, streams, strict=False):
            sizes = part_sizes(length, ranks)
            first = start + sum(sizes[:rank])
            last = first + sizes[rank]
            if pieces and pieces[-1][1] == first:
                first = pieces.pop()[0]
            pieces += [(first, last)] * (first < last)
    return replace(layout, pieces=tuple(pieces) if len(pieces) > 1 else ())


def part_sizes(length: int, ranks: int) -> list[int]:
    """How many of so many tokens each rank gets, as torch.tensor_split cuts them."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


def _places(spans: Iterable[Span]) -> list[int]:
    return [place for first, last in spans for place in range(first, last)]


def _spans(places: Iterable[int] | torch.Tensor) -> tuple[Span, ...]:
    """The fewest half-open spans that hold exactly these places."""
    at = torch.as_tensor(places if isinstance(places, torch.Tensor) else list(places), device="cpu").long().unique()
    if not len(at):
        return ()
    gaps = (at.diff() > 1).nonzero().flatten()
    firsts, lasts = at[torch.cat([gaps.new_zeros(1), gaps + 1])], at[torch.cat([gaps, gaps.new_full((1,), -1)])]
    return tuple(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
