"""What the demo model reads a caption with: a word tokenizer and a learned encoder of words.

Captions are padded to one length with a word of their own, which the model reads like any other: it needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PATCH_SIZE = 4
CAPTION_LENGTH = 32  # word numbers of a caption
PAD, START = 0, 1  # words follow
# all words of the scenes that the model is trained on; their order is that of the trained embedding
_WORDS = (
    "a above an and around at away behind blue bounces camera checkered circles closer comes cone cube cyan cylinder "
    "drops floor from front glass green grey hits in leaves left matte metal moves next of orange orbits out purple "
    "red right rolls sandy slides sphere spins stands still striped sunset the to white yellow"
)
VOCABULARY: tuple[str, ...] = tuple(_WORDS.split())


def _word_ids(caption: str) -> list[int]:
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    unknown = sorted(set(words) - set(VOCABULARY))
    if unknown:
        raise ValueError(
            f"the demo model does not know {', '.join(map(repr, unknown))} (in {caption!r}). "
            f"Use these words only: {', '.join(VOCABULARY)}"
        )
    if len(words) >= CAPTION_LENGTH:
        raise ValueError(
            f"a demo caption has at most {CAPTION_LENGTH - 1} words, got {len(words)}; shorten {caption!r}"
        )
    return [START] + [VOCABULARY.index(word) + START + 1 for word in words]


def tokenize(captions: str | Sequence[str]) -> Tensor:
    """Word numbers int64 [B, 32] of captions; PAD fills the end. The empty caption is one start token.

    Commas, full stops and upper case are ignored. ValueError for a word outside `VOCABULARY` (the message lists the
    allowed ones) and for more than 31 words; TypeError for anything but strings.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"captions must be a string or a non-empty list of strings, got {captions!r}")
    rows = [_word_ids(caption) for caption in captions]
    return torch.tensor([row + [PAD] * (CAPTION_LENGTH - len(row)) for row in rows])


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Word and position embeddings, and a summary in which every position weighs the features its own way."""

    @register_to_config
    def __init__(self, vocabulary_size: int, caption_length: int = CAPTION_LENGTH, embed_dim: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, embed_dim)
        self.positions = nn.Embedding(caption_length, embed_dim)
        self.weights = nn.Embedding(caption_length, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [B, L] -> word embeddings [B, L, E] and their summary [B, E]."""
        length = ids.shape[1]
        embeds = self.norm(self.words(ids) + self.positions.weight[:length])
        summary = (embeds * self.weights.weight[:length] * (ids != PAD).unsqueeze(-1)).sum(1) / length**0.5
        return embeds, summary
