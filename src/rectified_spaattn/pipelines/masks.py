"""Key masks that reach attention: which forms they have, and what they say of text and of video tokens."""

from dataclasses import dataclass, field

import torch

from ..layout import TokenLayout

_ALLOWED = (
    "a bool key mask, True for a valid key, that is one for all heads and queries: [1 or B, S] or [1 or B, 1, 1, S]"
)


@dataclass(eq=False)
class MaskedLayouts:
    """What the masks of one forward make of its layout. The device is waited for once a mask, not once a layer."""

    _known: list[tuple[torch.Tensor, TokenLayout, torch.Tensor]] = field(default_factory=list)

    def of(
        self, mask: torch.Tensor, layout: TokenLayout, full: TokenLayout, batch: int
    ) -> tuple[TokenLayout, torch.Tensor]:
        """As `masked_layout`."""
        for other, masked, valid in self._known:
            if _same(mask, other):
                return masked, valid
        masked, valid = masked_layout(mask, layout, full, batch)
        self._known.append((mask, masked, valid))
        return masked, valid


def masked_layout(
    mask: torch.Tensor, layout: TokenLayout, full: TokenLayout, batch: int
) -> tuple[TokenLayout, torch.Tensor]:
    """A layout in which hidden video tokens stand alone, and bool [B, text]: which of those that do are valid.

    layout: of the tokens that attend, the first ones of `full`, of all tokens that the mask is for. Waits for the
    device. Raises ValueError as `key_mask`.
    """
    valid = key_mask(mask, batch, full.sequence)[:, : layout.sequence]
    hidden = (~valid[:, layout.video_places.to(valid.device)]).any(0).cpu()
    masked = layout.without(layout.video_places[hidden].tolist()) if hidden.any() else layout
    return masked, valid[:, masked.text_places.to(valid.device)]


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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are one part of one storage: a view made anew for every layer is the same mask."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
    )
