"""What every backend gets of a call."""

from typing import NamedTuple

import torch

from ..config import SparseConfig
from ..orders import Blocks


class Inputs(NamedTuple):
    """One checked call. Tensors share one device.

    q            [B, S, H, D], any strides, in the model's token order
    k, v         [B, S, Hk, D], likewise; head h of q attends to head h // (H // Hk) of k
    blocks       which token is in which block; its tensors are on the device of q
    config       what to do
    text_mask    bool [B, text], True where a token that stands alone is valid
    scale        factor of the logits
    block_mask   bool [B, H, nb, nb], contiguous: critical blocks in place of stage 3; None: to be chosen
    token_order  int [B, Hk, nb*b], places of the tiled tokens where every key head has an order of its own, which the
                 queries that share it share; None: they are those of blocks.tiled
    top_k        float [B, H], how many blocks a row stage 3 keeps at least; None: what the sparsity says
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: Blocks
    config: SparseConfig
    text_mask: torch.Tensor
    scale: float
    block_mask: torch.Tensor | None = None
    token_order: torch.Tensor | None = None
    top_k: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """H // Hk, the query heads that share a key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, I]: which isolated tokens are valid; leftover ones always are."""
        return torch.nn.functional.pad(self.text_mask, (self.blocks.leftover, 0), value=True)
