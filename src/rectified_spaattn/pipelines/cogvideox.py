"""CogVideoX through diffusers' dispatcher: its stock processors call scaled_dot_product_attention themselves."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

Rotary = tuple[torch.Tensor, torch.Tensor]


class CogVideoXProcessor:
    """Joint attention over text and then video."""

    fused = False  # by the processor it stands in for: the module keeps what it fused, and its flag, for ever
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: video [B, N, C]; encoder_hidden_states: text [B, L, C]. Returns both, attended."""
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = attn.to_qkv(tokens).chunk(3, dim=-1) if self.fused else _separately(attn, tokens)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = _rotated(q, text, image_rotary_emb), _rotated(k, text, image_rotary_emb)

        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, text:], out[:, :text]


class FusedCogVideoXProcessor(CogVideoXProcessor):
    """The same with fused projections."""

    fused = True


def _separately(attn: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)


def _rotated(x: torch.Tensor, text: int, rotary: Rotary) -> torch.Tensor:
    """x: [B, S, H, D]. Video tokens rotated, text as it is."""
    return torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], rotary, sequence_dim=1)], dim=1)
