"""What the demo model reads a caption with: a word tokenizer and a learned encoder of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PATCH_SIZE = 4
CAPTION_LENGTH = 32  # word numbers of a caption; the first is the start token
START_ID = 1  # 0 is padding; words follow
# all words of the scenes that the model is trained on; their order is that of the trained embedding
_WORDS = (
    "a an and at background black blue bottom camera center checkered circle clockwise counterclockwise crescent cross "
    "cyan diamond dotted down green growing in large larger left marbled moving orange out over pans pink purple red "
    "right ring ringed shaded small smaller solid spinning square standing star still striped the top triangle up "
    "white yellow zigzag zooms"
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
    return [START_ID] + [VOCABULARY.index(word) + START_ID + 1 for word in words]


def tokenize(captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """Turn captions into word numbers (int64 [B, 32]) and a validity mask (bool [B, 32], valid words first).

    Commas, full stops and upper case are ignored. The empty caption is one start token. ValueError for a word outside
    `VOCABULARY` (the message lists the allowed ones) and for more than 31 words; TypeError for anything but strings.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"captions must be a string or a non-empty list of strings, got {captions!r}")
    rows = [_word_ids(caption) for caption in captions]
    ids = torch.tensor([row + [0] * (CAPTION_LENGTH - len(row)) for row in rows])
    return ids, ids != 0


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Word and position embeddings: what the transformer reads a caption from."""

    @register_to_config
    def __init__(self, vocabulary_size: int, caption_length: int = CAPTION_LENGTH, embed_dim: int = 192) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, embed_dim)
        self.positions = nn.Embedding(caption_length, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [B, L], mask bool [B, L] -> word embeddings [B, L, E] and their mean over valid words [B, E]."""
        embeds = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])
        weight = mask.unsqueeze(-1).to(embeds.dtype)
        return embeds, (embeds * weight).sum(1) / weight.sum(1)
