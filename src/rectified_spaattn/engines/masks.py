"""Key masks as engines pass them, bool or added to the logits, and what they make of a layout."""

import torch

from ..layout import TokenLayout, masked_layout, same_tensor

HIDDEN = -1e4  # what is added to hide a key lies at least this far below zero, in every dtype

Masked = tuple[TokenLayout, torch.Tensor | None]


class Masks:
    """What the masks of one forward make of a layout. The device is waited for once a mask, not once a layer."""

    def __init__(self) -> None:
        self._known: list[tuple[torch.Tensor, TokenLayout, Masked | str]] = []

    def of(self, mask: torch.Tensor, layout: TokenLayout, batch: int) -> Masked | str:
        """As `masked`."""
        for other, of, known in self._known:
            if same_tensor(mask, other) and of == layout:
                return known
        result = masked(mask, layout, batch)
        self._known.append((mask, layout, result))
        return result


def masked(mask: torch.Tensor, layout: TokenLayout, batch: int) -> Masked | str:
    """The layout in which hidden tokens stand alone, and bool [B, text]: which of those are valid; None: all of them.

    mask: [1 or B, S], [1 or B, 1, S] or [1 or B, 1, 1, S]; bool, True for a valid key, or added to the logits: zero for
    a valid key, HIDDEN or less for another one. For any other mask the reason why it cannot be read, in words.
    Waits for the device.
    """
    shape, sequence = mask.shape, layout.sequence
    of_keys = mask.ndim in (2, 3, 4) and shape[-1] == sequence and all(side == 1 for side in shape[1:-1])
    if not of_keys or shape[0] not in (1, batch):
        return "a mask for each query or head"
    valid = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((valid | (mask <= HIDDEN)).all()):
        return "a mask that weighs keys"
    valid = valid.reshape(shape[0], sequence).expand(batch, sequence)
    if bool(valid.all()):
        return layout, None
    return masked_layout(valid, layout)
