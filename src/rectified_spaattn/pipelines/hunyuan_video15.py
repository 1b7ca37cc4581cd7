"""HunyuanVideo 1.5 with a key mask [B, 1, 1, S]: its stock processor builds [B, 1, S, S], 12 GiB at 720p."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from .hunyuan_video import rank_after_rank, whole_length


class HunyuanVideo15Processor:
    """Joint attention over video and then text. Padding is never a key; as a query it gives what nobody reads."""

    masks_text_only = True
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: video [B, N, C]; encoder_hidden_states: text [B, L, C]; attention_mask: of the text [B, L].

        Where processes share the model these are parts of the tokens, but for the mask. Returns both, attended.
        """
        video = hidden_states.shape[1]
        q, k, v = (self._heads(attn, project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = self._rotated(q, image_rotary_emb), self._rotated(k, image_rotary_emb)

        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (self._heads(attn, project(encoder_hidden_states)) for project in projections)
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)

        out = dispatch_attention_fn(
            torch.cat([q, text_q], dim=1),
            torch.cat([k, text_k], dim=1),
            torch.cat([v, text_v], dim=1),
            attn_mask=self._mask(attention_mask, video),
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2)
        text = out[:, video:]
        if hasattr(attn, "to_add_out"):  # not in Mochi's last block
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](out[:, :video])), text

    @staticmethod
    def _rotated(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rotated: torch.Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
        return rotated

    def _mask(self, text: torch.Tensor, video: int) -> torch.Tensor:
        """bool [B, 1, 1, S] of all tokens. text: [B, L]; video: how many tokens of it there are here."""
        before = whole_length(video, self._parallel_config)
        return torch.nn.functional.pad(text.bool(), (before, 0), value=True)[:, None, None]

    @staticmethod
    def _heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (attn.heads, -1))


class CutHunyuanVideo15Processor(HunyuanVideo15Processor):
    """For dense attention on a part of the tokens: the mask is in the order in which they lie."""

    def _mask(self, text: torch.Tensor, video: int) -> torch.Tensor:
        return rank_after_rank(super()._mask(text, video), video, self._parallel_config)
