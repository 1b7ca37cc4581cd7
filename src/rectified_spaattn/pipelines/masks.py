"""Key masks that reach attention: which form they have, and whether they hide video tokens."""

from dataclasses import dataclass, field

import torch

ALLOWED = (
    "a bool key mask, True for a valid key, that is one for all heads and queries: [S], [1 or B, S] or "
    "[1 or B, 1, 1, S]"
)


def key_mask(mask: torch.Tensor, batch: int, sequence: int) -> torch.Tensor:
    """bool [B, S] of any mask that scaled_dot_product_attention takes and that masks keys alone.

    Raises ValueError for every other one: it would have to be ignored.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 2:  # diffusers' dispatcher reads two dimensions as [B, S]
        shape = (shape[0], 1, 1, shape[1])
    shape = (1,) * (4 - len(shape)) + shape
    if mask.dtype != torch.bool or len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] != (1, 1, sequence):
        raise ValueError(
            f"attention mask: got {mask.dtype} {list(mask.shape)} for {batch} sample(s) of {sequence} tokens; allowed: "
            f"{ALLOWED}. Pass such a mask, or disable rectified attention on this model."
        )
    return mask.reshape(shape[0], sequence).expand(batch, sequence)


@dataclass(eq=False)
class HiddenKeys:
    """Places that the masks of one forward hide. The device is asked once a mask, not once a layer."""

    _known: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def places(self, mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """int64 on the CPU, ascending: which of the tokens any sample hides. Waits for the device the first time.

        mask: as it came; keys: bool [B, n], what it says of these tokens.
        """
        for other, places in self._known:
            if _same(mask, other):
                return places
        places = (~keys).any(0).nonzero().flatten().cpu()
        self._known.append((mask, places))
        return places


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are one part of one storage; a view made anew for every layer is the same mask."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
    )
