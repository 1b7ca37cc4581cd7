"""Processors that stand in for stock ones which attend by themselves, or ask the dispatcher for what it must not do."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models import transformers
from diffusers.models._modeling_parallel import gather_size_by_comm
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
    MochiAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3AttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

SR: Any = getattr(transformers, "transformer_kandinsky6_sr", None)  # with Kandinsky 6 SR: from diffusers 0.42 on
Rotary = tuple[torch.Tensor, torch.Tensor]


class Dispatching:
    """What diffusers sets on a processor, and attention by it."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """q, k, v: [B, S, H, D]. Returns [B, S, H * D]."""
        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config, **options
        )
        return out.flatten(2)


def _projected(
    x: torch.Tensor, projections: Iterable[Callable[..., torch.Tensor]], heads: tuple[int, int]
) -> list[torch.Tensor]:
    """x [..., C] by each of the projections, its heads apart: [..., H, D]. heads: (H, D), one of them -1."""
    return [project(x).unflatten(-1, heads) for project in projections]


class CogVideoXProcessor(Dispatching):
    """Joint attention over text and then video."""

    fused = False  # by the processor it stands in for: the module keeps what it fused, and its flag, for ever

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
        if self.fused:
            q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in attn.to_qkv(tokens).chunk(3, dim=-1))
        else:
            q, k, v = _projected(tokens, (attn.to_q, attn.to_k, attn.to_v), (attn.heads, -1))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for x in (q, k)
            )
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v, attn_mask=attention_mask)))
        return out[:, text:], out[:, :text]


class FusedCogVideoXProcessor(CogVideoXProcessor):
    """The same with fused projections."""

    fused = True


class CutHunyuanVideoProcessor(HunyuanVideoAttnProcessor2_0):
    """The stock processor for dense attention on a part of the tokens, which lie rank after rank."""

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


class HunyuanVideo15Processor(Dispatching):
    """Joint attention over video and then text with a key mask [B, 1, 1, S]; the stock one's takes 12 GiB at 720p.

    Padding is never a key; as a query it gives what nobody reads.
    """

    masks_text_only = True

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: video [B, N, C]; encoder_hidden_states: text [B, L, C]; attention_mask: of the text [B, L].

        Where processes share the model these are parts of the tokens, but for the mask. Returns both, attended.
        """
        video, heads = hidden_states.shape[1], (attn.heads, -1)
        q, k, v = _projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), heads)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = self._rotated(q, image_rotary_emb), self._rotated(k, image_rotary_emb)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = _projected(encoder_hidden_states, added, heads)
        if attn.norm_added_q is not None:
            text_q = attn.norm_added_q(text_q)
        if attn.norm_added_k is not None:
            text_k = attn.norm_added_k(text_k)
        joined = [torch.cat(both, dim=1) for both in ((q, text_q), (k, text_k), (v, text_v))]
        out = self.attend(*joined, attn_mask=self._mask(attention_mask, video))
        text = out[:, video:]
        if hasattr(attn, "to_add_out"):  # not in Mochi's last block
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](out[:, :video])), text

    @staticmethod
    def _rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        rotated: torch.Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
        return rotated

    def _mask(self, text: torch.Tensor, video: int) -> torch.Tensor:
        """bool [B, 1, 1, S] of all tokens. text: [B, L]; video: how many tokens of it there are here."""
        before = whole_length(video, self._parallel_config)
        return torch.nn.functional.pad(text.bool(), (before, 0), value=True)[:, None, None]


class CutHunyuanVideo15Processor(HunyuanVideo15Processor):
    """For dense attention on a part of the tokens: the mask is in the order in which they lie."""

    def _mask(self, text: torch.Tensor, video: int) -> torch.Tensor:
        return rank_after_rank(super()._mask(text, video), video, self._parallel_config)


class MochiProcessor(HunyuanVideo15Processor):
    """The stock processor attends sample by sample, each cut to its text."""

    @staticmethod
    def _rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """x: [B, N, H, D]; rotary: cos and sin [N, H, D / 2], other ones in every head."""
        cos, sin = rotary
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class CosmosProcessor(Dispatching):
    """Self-attention of Cosmos; the stock processor names no backend."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """hidden_states: [B, N, C]. Returns it, attended."""
        q, k, v = _projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.heads, -1))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            rotate = {"use_real": True, "use_real_unbind_dim": -2, "sequence_dim": 1}
            q, k = (apply_rotary_emb(x, image_rotary_emb, **rotate) for x in (q, k))
        out = self.attend(q, k, v, attn_mask=attention_mask).type_as(q)
        attended: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return attended


class Cosmos3Processor(Dispatching):
    """Text attends causally to itself; what is made attends to all, the text among it.

    One call of as many queries as keys in place of the stock processor's one of fewer: text is a query there, too, and
    nobody reads what that gives.
    """

    def __call__(
        self, attn: Any, und_seq: torch.Tensor, gen_seq: torch.Tensor, rotary_emb: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """und_seq: text [L, C]; gen_seq: video and sound [N, C]. Returns both, attended."""
        heads, of_text, of_made = (-1, attn.head_dim), rotary_emb[:2], rotary_emb[2:]
        q, k, v = _projected(und_seq, (attn.to_q, attn.to_k, attn.to_v), heads)
        q, k = attn.norm_q(q), attn.norm_k(k)
        seen = k if attn.k_norm_und_for_gen is None else attn.k_norm_und_for_gen(k)
        q, k, seen = (self._rotated(x, *of_text) for x in (q, k, seen))
        made_q, made_k, made_v = _projected(gen_seq, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), heads)
        made_q = self._rotated(attn.norm_added_q(made_q), *of_made)
        made_k = self._rotated(attn.norm_added_k(made_k), *of_made)

        q_first, k_first, v_first = (x[None].transpose(1, 2) for x in (q, k, v))
        causal = torch.nn.functional.scaled_dot_product_attention(
            q_first, k_first, v_first, is_causal=True, enable_gqa=True
        )
        joined = [torch.cat(both)[None] for both in ((q, made_q), (seen, made_k), (v, made_v))]
        out = self.attend(*joined, enable_gqa=True)
        return attn.to_out(causal[0].transpose(0, 1).flatten(1)), attn.to_add_out(out[0, len(und_seq) :])

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


class Kandinsky6SRProcessor(Dispatching):
    """Without the model's own sparse attention, NABLA, for which the stock processor names flex attention."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, rotary_emb: torch.Tensor, sparse_params: Any
    ) -> torch.Tensor:
        """hidden_states: [B, N, C]. Returns it, attended."""
        q, k, v = _projected(hidden_states, (attn.to_query, attn.to_key, attn.to_value), (attn.num_heads, -1))
        q, k = attn.query_norm(q.float()).type_as(q), attn.key_norm(k.float()).type_as(k)
        out = self.attend(SR.apply_rotary(q, rotary_emb), SR.apply_rotary(k, rotary_emb), v)
        attended: torch.Tensor = attn.out_layer(out)
        return attended


class Ideogram4Processor(Ideogram4AttnProcessor):
    """With a key mask [B, 1, 1, S] for [B, 1, S, S]: what the last token, one of the image, attends to.

    All tokens of its document attend to the same; padding, which stands before, gives what nobody reads.
    """

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor, image_rotary_emb: Rotary
    ) -> torch.Tensor:
        out: torch.Tensor = super().__call__(attn, hidden_states, attention_mask[:, :, -1:], image_rotary_emb)
        return out


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


# Stock processors that are wrong on a part of the tokens, and ours for a dense model that is cut over processes.
CUT: dict[Any, Any] = {
    CogVideoXAttnProcessor2_0: CogVideoXProcessor,
    FusedCogVideoXAttnProcessor2_0: FusedCogVideoXProcessor,
    HunyuanVideo15AttnProcessor2_0: CutHunyuanVideo15Processor,
    HunyuanVideoAttnProcessor2_0: CutHunyuanVideoProcessor,
}
# Processors that attend by themselves, or could not at full size, and those that take their place in a sparse model.
STAND_INS: dict[Any, Any] = {
    CogVideoXAttnProcessor2_0: CogVideoXProcessor,
    FusedCogVideoXAttnProcessor2_0: FusedCogVideoXProcessor,
    HunyuanVideo15AttnProcessor2_0: HunyuanVideo15Processor,
    CutHunyuanVideo15Processor: HunyuanVideo15Processor,
    CutHunyuanVideoProcessor: HunyuanVideoAttnProcessor2_0,
    CosmosAttnProcessor2_0: CosmosProcessor,
    Cosmos3AttnProcessor: Cosmos3Processor,
    Ideogram4AttnProcessor: Ideogram4Processor,
    Kandinsky5AttnProcessor: Kandinsky5Processor,
    MochiAttnProcessor2_0: MochiProcessor,
    **({SR.Kandinsky6SRAttnProcessor: Kandinsky6SRProcessor} if SR else {}),
}
