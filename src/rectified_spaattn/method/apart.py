"""Tokens that attend to each other only, such as the text of a model whose text knows nothing of its video."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..orders import Blocks
from .inputs import Inputs


def attend_apart(inputs: Inputs, out: torch.Tensor) -> None:
    """Writes to out [B, S, H, D] what the tokens apart get: attention to the valid ones of them, zeros without any."""
    blocks = inputs.blocks
    if not blocks.apart.numel():
        return
    places, valid = blocks.isolated[blocks.apart], inputs.valid[:, blocks.apart]
    sees = seen_apart(blocks, valid)
    q = inputs.q[:, places].transpose(1, 2)  # [B, H, A, D]
    # what is not valid need be no number
    k, v = (x[:, places].masked_fill(~valid[..., None, None], 0).transpose(1, 2) for x in (inputs.k, inputs.v))
    grouped = inputs.group > 1
    among = scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None], scale=inputs.scale, enable_gqa=grouped)
    among = among.masked_fill(~sees.any(-1)[:, None, :, None], 0)
    out.index_copy_(1, places, among.transpose(1, 2).to(out.dtype))


def seen_apart(blocks: Blocks, valid: torch.Tensor) -> torch.Tensor:
    """bool [B, A, A]: which of the tokens apart (columns) each of them (rows) attends to. valid: bool [B, A]."""
    sees = valid[:, None].expand(-1, valid.shape[1], -1)
    return sees.tril() if blocks.causal else sees


def pairs_apart(valid: torch.Tensor, causal: bool) -> torch.Tensor:
    """float32 [B]: how many pairs that are. valid: bool [B, A]."""
    count = valid.shape[1]
    queries = torch.full((count,), count, device=valid.device)  # that attend to each key
    if causal:
        queries = torch.arange(count, 0, -1, device=valid.device)
    return (valid * queries).sum(1).float()
