"""Key masks that reach attention: which forms they have, and what they say of text and of video tokens."""

from dataclasses import dataclass, field

import torch

from ..layout import TokenLayout, masked_layout, same_tensor
from .ranks import Ranks

_ALLOWED = (
    "a bool key mask, True for a valid key, that is one for all heads and queries: [1 or B, S] or [1 or B, 1, 1, S]"
)


@dataclass(eq=False)
class KeyMasks:
    """What the masks of one forward say. Processes exchange theirs, and the device is waited for, once a mask.

    layout  of all tokens of the forward, padding included
    ranks   the processes that share it, whose masks may be of their own part of `streams`; None: one process
    """

    layout: TokenLayout
    ranks: Ranks | None = None
    streams: tuple[int, ...] = ()
    _valid: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _layouts: list[tuple[torch.Tensor, TokenLayout, torch.Tensor]] = field(default_factory=list)

    def valid(self, mask: torch.Tensor, batch: int) -> torch.Tensor:
        """bool [B, S]: which tokens may be attended to, in the model's order. Raises ValueError as `key_mask`."""
        for other, valid in self._valid:
            if same_tensor(mask, other):
                return valid
        part = None if self.ranks is None else self.ranks.part(self.streams, self.ranks.rank)
        if self.ranks is not None and mask.shape[-1] == part:
            joined = self.ranks.join(key_mask(mask, batch, part), self.streams)
            valid = joined[:, self.layout.place.to(joined.device)]
        else:
            valid = key_mask(mask, batch, self.layout.sequence)
        self._valid.append((mask, valid))
        return valid

    def masked(self, mask: torch.Tensor, batch: int, unpadded: TokenLayout) -> tuple[TokenLayout, torch.Tensor]:
        """As `masked_layout` of what the mask says."""
        for other, masked, text in self._layouts:
            if same_tensor(mask, other):
                return masked, text
        masked, text = masked_layout(self.valid(mask, batch), unpadded)
        self._layouts.append((mask, masked, text))
        return masked, text

    def in_place(self, mask: torch.Tensor, batch: int) -> torch.Tensor:
        """bool [B, 1, 1, S]: the mask in the order in which q, k, v lie, for dense attention."""
        return self.valid(mask, batch)[:, None, None, self.layout.token.to(mask.device)]


def key_mask(mask: torch.Tensor, batch: int, sequence: int) -> torch.Tensor:
    """bool [B, S] of any mask that scaled_dot_product_attention takes and that masks keys alone.

    Raises ValueError for every other one: it would have to be ignored.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 2:  # diffusers' dispatcher reads two dimensions as [B, S]
        shape = (shape[0], 1, 1, shape[1])
    shape = (1,) * (4 - len(shape)) + shape
    of_keys = mask.ndim >= 2 and shape in ((1, 1, 1, sequence), (batch, 1, 1, sequence))
    if mask.dtype != torch.bool or not of_keys:
        raise ValueError(
            f"attention mask: got {mask.dtype} {list(mask.shape)} for {batch} sample(s) of {sequence} tokens; allowed: "
            f"{_ALLOWED}. Pass such a mask, or disable rectified attention on this model."
        )
    return mask.reshape(shape[0], sequence).expand(batch, sequence)


def key_text_mask(mask: torch.Tensor | None, layout: TokenLayout) -> torch.Tensor | None:
    """bool [B, text]: what a key mask says of the text, for instruments. ValueError where it hides video tokens."""
    if mask is None:
        return None
    masked, valid = masked_layout(key_mask(mask, len(mask), layout.sequence), layout)
    if masked is not layout:
        raise ValueError(f"attention mask: got one that hides {masked.text - layout.text} video tokens; allowed: none.")
    return valid
