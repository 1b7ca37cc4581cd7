"""Probe rows: a few queries of every head also attend exactly, to measure what a sparse output gets wrong."""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Probe(NamedTuple):
    """Norms over the probe rows of every head, float32 [B, H]: |out - full| and |full|."""

    wrong: torch.Tensor
    full: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """|out - full| / |full| of every head: float32 [B, H]."""
        return self.wrong / self.full.clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def call_error(self) -> torch.Tensor:
        """The same over all heads together: float32 [B]."""
        return Probe(self.wrong.norm(dim=1), self.full.norm(dim=1)).error


def probe_places(order: torch.Tensor, rows: int) -> torch.Tensor:
    """int64 [..., R]: `rows` tiled tokens, all there are at most, one in each of as many equal spans of the order.

    order: int [..., nb * b], places in the sequence, block after block. Where in its span a row lies follows the golden
    ratio: at one place in every span it would be at one place in every block, which a sorted order gives to one kind of
    token.
    """
    count = order.shape[-1]
    rows = min(rows, count)
    j = torch.arange(rows, device=order.device)
    within = j * 40503 % 65536 * count // 65536  # 40503 / 65536 is the golden ratio less 1
    return order[..., (j * count + within) // max(1, rows)].long()


def probe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    places: torch.Tensor,
    *,
    valid: torch.Tensor | None,
    scale: float,
) -> Probe:
    """What a sparse output gets wrong in some rows, which attend here to every valid key, in the dtype of the call.

    q, out: [B, S, H, D]; k, v: [B, S, H or fewer, D]; places: int64 [B, H, R], of the rows; valid: bool [B, S], keys
    that may be attended to; None: all. Does not wait for the device.
    """
    at = places.transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[3])  # [B, R, H, D]
    full = scaled_dot_product_attention(
        q.gather(1, at).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if valid is None else valid[:, None, None],
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    full = full.transpose(1, 2).float()
    return Probe((out.gather(1, at).float() - full).norm(dim=(1, 3)), full.norm(dim=(1, 3)))
