"""Inputs that several test files share: video-like tensors, drawn calls, strided views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rectified_spaattn import SparseConfig, TokenLayout
from rectified_spaattn.config import RECTIFY
from rectified_spaattn.orders import Blocks, blocks_of

MODES = tuple(RECTIFY)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def video_like(
    seed: int,
    batch: int,
    sequence: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    key_heads: int | None = None,
) -> Tensors:
    """q, k, v [B, S, H, D] with runs of similar tokens, so that some blocks are worth compensating and some are not.

    key_heads: of k and v, as many as `heads` where None.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(noise: float, heads: int = key_heads or heads) -> torch.Tensor:
        runs = torch.randn(batch, -(-sequence // 16), heads, head_dim, generator=generator)
        smooth = runs.repeat_interleave(16, dim=1)[:, :sequence]
        return (smooth + noise * torch.randn(batch, sequence, heads, head_dim, generator=generator)).to(dtype)

    return draw(0.3, heads), draw(0.3), draw(1.0)


def seen(layout: TokenLayout, text_valid: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, 1, S], the keys that may be attended to. text_valid: bool [B, text]."""
    valid = text_valid.new_ones(len(text_valid), layout.sequence)
    valid[:, layout.text_places] = text_valid
    return valid[:, None, None]


def kernel_budget(qkv: Sequence[torch.Tensor], layout: TokenLayout, text_valid: torch.Tensor) -> float:
    """What a kernel may be off, over the largest exact output: twice what SDPA is on these tensors in their dtype, one
    rounding more for R * sparse + C in that dtype, and planning, which is right to 16 bits.
    """
    group, mask = qkv[0].shape[2] // qkv[1].shape[2], seen(layout, text_valid)
    heads_first = [qkv[0].transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in qkv[1:])]
    exact = scaled_dot_product_attention(*(x.double() for x in heads_first), attn_mask=mask)
    own = scaled_dot_product_attention(*heads_first, attn_mask=mask).double() - exact
    error = (own.abs().max() / exact.abs().max()).item()
    return 2 * error + torch.finfo(qkv[0].dtype).eps + 2.0**-16


@dataclass
class Call:
    """One call: rectified_attention(*c.qkv, c.layout, c.config, **c.options)."""

    layout: TokenLayout
    config: SparseConfig
    qkv: Tensors = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.qkv, self.layout, self.config)

    @property
    def blocks(self) -> Blocks:
        return blocks_of(self.layout, self.config)

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, 1, 1, S], the keys that may be attended to."""
        mask = self.options.get("text_mask")
        mask = torch.ones(len(self.qkv[0]), self.layout.text, dtype=torch.bool) if mask is None else mask
        return seen(self.layout, mask)


GRIDS = ((4, 4, 8), (2, 8, 8), (3, 5, 7), (1, 11, 13), (7, 5, 5), (3, 8, 8), (1, 8, 16), (2, 7, 11), (11, 4, 5))
HEADS = ((1, 1), (2, 2), (3, 3), (2, 1), (4, 2), (3, 1))  # of queries and of keys
GRIDS += ((1, 1, 67), (5, 6, 7), (1, 1, 1), (1, 3, 4))  # the last two hold no block


@st.composite
def calls(draw: Callable[..., Any], modes: tuple[str, ...] = MODES, min_blocks: int = 0) -> Call:
    """Small calls of every kind: grids below one block, primes, one frame; no text, masked text, all text masked."""
    block_size = draw(st.sampled_from((16, 32) if min_blocks else (16, 32, 64)))
    grid = draw(st.sampled_from(GRIDS).filter(lambda g: g[0] * g[1] * g[2] >= min_blocks * block_size))
    text = draw(st.sampled_from((0, 1, 5, 17, 40)))
    order = draw(st.sampled_from(("gilbert", "tile", "raster")))
    layout = TokenLayout.build(grid, text, draw(st.booleans()))
    config = SparseConfig(
        sparsity=draw(st.sampled_from((0.0, 0.4, 0.8, 0.95))),
        top_p=draw(st.sampled_from((0.0, 0.3, 0.7, 0.9, 1.0))),
        rectify=draw(st.sampled_from(modes)),
        block_size=block_size,
        order=order,
        neighbours=draw(st.sampled_from((False, False, True))),
        first_frame=draw(st.sampled_from((False, False, True))),
    )
    batch, (heads, key_heads) = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(HEADS))
    head_dim, seed = draw(st.sampled_from((4, 8, 20))), draw(st.integers(0, 2**20))
    options: dict[str, Any] = {"scale": draw(st.sampled_from((None, None, 0.1, 1.0)))}
    kept = draw(st.sampled_from((None, 1.0, 0.5, 0.0)))
    if kept is not None:  # any pattern of valid tokens, not only a prefix
        options["text_mask"] = torch.rand(batch, text, generator=torch.Generator().manual_seed(seed)) < kept
    return Call(layout, config, video_like(seed, batch, layout.sequence, heads, head_dim, key_heads=key_heads), options)


def _packed(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x + 1, x - 1], dim=2)[:, :, 0]


def _sliced(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


# Same values, other strides.
STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "[B, H, S, D] in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "qkv packed": _packed,
    "every other element of a wider tensor": _sliced,
    "one head expanded": lambda x: x[:, :, :1].expand(x.shape),
}
