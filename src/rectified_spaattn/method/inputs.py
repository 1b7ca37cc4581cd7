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
    out          [B, S, H, D], where the output goes; None: memory of its own
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
    out: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """H // Hk, the query heads that share a key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, I]: which isolated tokens are valid; leftover ones always are."""
        return torch.nn.functional.pad(self.text_mask, (self.blocks.leftover, 0), value=True)

    def of_key_heads(self, first: int, last: int) -> "Inputs":
        """What the key heads from `first` to before `last` have to do with."""
        keys, queries = slice(first, last), slice(first * self.group, last * self.group)
        return self._replace(
            q=self.q[:, :, queries],
            k=self.k[:, :, keys],
            v=self.v[:, :, keys],
            block_mask=None if self.block_mask is None else self.block_mask[:, queries].contiguous(),
            token_order=None if self.token_order is None else self.token_order[:, keys],
            top_k=None if self.top_k is None else self.top_k[:, queries],
            out=None if self.out is None else self.out[:, :, queries],
        )

    def new_out(self) -> torch.Tensor:
        """[B, S, H, D] for the output, in the dtype of q; zeros where it is padding, and anything elsewhere."""
        if self.out is not None:
            return self.out
        padded = self.blocks.sequence < self.q.shape[1]
        make = torch.zeros if padded else torch.empty
        return make(self.q.shape, dtype=self.q.dtype, device=self.q.device)
