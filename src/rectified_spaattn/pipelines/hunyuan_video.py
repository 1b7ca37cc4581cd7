"""HunyuanVideo cut over processes: its mask is of all tokens, one after the other, and they lie rank after rank."""

from typing import Any

import torch
from diffusers.models._modeling_parallel import gather_size_by_comm
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0


class CutHunyuanVideoProcessor(HunyuanVideoAttnProcessor2_0):
    """The stock processor for dense attention on a part of the tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> Any:
        """hidden_states: video [B, N, C]; encoder_hidden_states: text [B, L, C]; attention_mask: of all ranks."""
        if attention_mask is not None:
            attention_mask = rank_after_rank(attention_mask, hidden_states.shape[1], self._parallel_config)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def whole_length(part: int, config: Any) -> int:
    """How many tokens of a stream all ranks have together. config: diffusers' ParallelConfig; None: no others."""
    if config is None:
        return part
    config = config.context_parallel_config
    if config.ulysses_anything:
        return sum(gather_size_by_comm(part, config._ulysses_mesh.get_group()))
    return part * int(config.ulysses_degree)


def rank_after_rank(mask: torch.Tensor, video: int, config: Any) -> torch.Tensor:
    """A mask [..., S] of video and text, in the order in which q, k, v lie. video: tokens of it that this rank has."""
    whole = whole_length(video, config)
    ranks = config.context_parallel_config.ulysses_degree
    parts = zip(*(x.tensor_split(ranks, dim=-1) for x in (mask[..., :whole], mask[..., whole:])), strict=True)
    return torch.cat([part for both in parts for part in both], dim=-1)
