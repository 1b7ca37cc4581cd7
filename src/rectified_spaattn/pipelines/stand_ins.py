"""Processors that stand in for stock ones which leave the dispatcher no choice, or ask it for what it must not do."""

from typing import Any

import torch
from diffusers.models import transformers
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

from .hunyuan_video15 import HunyuanVideo15Processor

SR: Any = getattr(transformers, "transformer_kandinsky6_sr", None)  # with Kandinsky 6 SR: from diffusers 0.42 on


class CosmosProcessor:
    """Self-attention of Cosmos; the stock processor names no backend."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states: [B, N, C]. Returns it, attended."""
        q, k, v = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            rotate = {"use_real": True, "use_real_unbind_dim": -2, "sequence_dim": 1}
            q, k = apply_rotary_emb(q, image_rotary_emb, **rotate), apply_rotary_emb(k, image_rotary_emb, **rotate)
        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        attended: torch.Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))
        return attended


class Cosmos3Processor:
    """Text attends causally to itself; what is made attends to all, the text among it.

    One call of as many queries as keys in place of the stock processor's one of fewer: text is a query there, too, and
    nobody reads what that gives.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self, attn: Any, und_seq: torch.Tensor, gen_seq: torch.Tensor, rotary_emb: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """und_seq: text [L, C]; gen_seq: video and sound [N, C]. Returns both, attended."""
        text, (of_text, of_made) = len(und_seq), (rotary_emb[:2], rotary_emb[2:])
        q, k, v = (self._heads(attn, project(und_seq)) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        seen = k if attn.k_norm_und_for_gen is None else attn.k_norm_und_for_gen(k)
        q, k, seen = (self._rotated(x, *of_text) for x in (q, k, seen))
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        made_q, made_k, made_v = (self._heads(attn, project(gen_seq)) for project in projections)
        made_q = self._rotated(attn.norm_added_q(made_q), *of_made)
        made_k = self._rotated(attn.norm_added_k(made_k), *of_made)

        heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
        causal = torch.nn.functional.scaled_dot_product_attention(
            heads_first[0], heads_first[1], heads_first[2], is_causal=True, enable_gqa=True
        )
        out = dispatch_attention_fn(
            torch.cat([q, made_q])[None],
            torch.cat([seen, made_k])[None],
            torch.cat([v, made_v])[None],
            enable_gqa=True,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(causal[0].transpose(0, 1).flatten(1)), attn.to_add_out(out[0, text:].flatten(1))

    @staticmethod
    def _heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, attn.head_dim))

    @staticmethod
    def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [L, H, D]; cos, sin: [L, D]."""
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class Kandinsky5Processor(Kandinsky5AttnProcessor):
    """Without the model's own sparse attention, NABLA."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: Any = None,
    ) -> torch.Tensor:
        out: torch.Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, rotary_emb)
        return out


class Kandinsky6SRProcessor:
    """Without the model's own sparse attention, NABLA, for which the stock processor names flex attention."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, rotary_emb: torch.Tensor, sparse_params: Any
    ) -> torch.Tensor:
        """hidden_states: [B, N, C]. Returns it, attended."""
        projections = (attn.to_query, attn.to_key, attn.to_value)
        q, k, v = (project(hidden_states).unflatten(-1, (attn.num_heads, -1)) for project in projections)
        q, k = attn.query_norm(q.float()).type_as(q), attn.key_norm(k.float()).type_as(k)
        out = dispatch_attention_fn(
            SR.apply_rotary(q, rotary_emb),
            SR.apply_rotary(k, rotary_emb),
            v,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended: torch.Tensor = attn.out_layer(out.flatten(2, 3))
        return attended


class Ideogram4Processor(Ideogram4AttnProcessor):
    """With a key mask [B, 1, 1, S] for [B, 1, S, S]: what the last token, one of the image, attends to.

    All tokens of its document attend to the same; padding, which stands before, gives what nobody reads.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        out: torch.Tensor = super().__call__(attn, hidden_states, attention_mask[:, :, -1:], image_rotary_emb)
        return out


class MochiProcessor(HunyuanVideo15Processor):
    """The stock processor attends sample by sample, each cut to its text."""

    @staticmethod
    def _rotated(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x: [B, N, H, D]; rotary: cos and sin [N, H, D / 2], other ones in every head."""
        cos, sin = rotary
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
