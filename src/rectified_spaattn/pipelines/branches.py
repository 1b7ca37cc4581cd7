"""Which guidance call of its step a forward is, told by its text, so that plans are kept for each alone."""

from dataclasses import dataclass
from typing import Any

import torch

from ..layout import same_tensor

MOST = 8
"""Forwards of one step that plans are kept for: more are no guidance."""


@dataclass(eq=False)
class _Text:
    """tensors, versions: as they came; step: the last that had it; calls: with it in that step so far."""

    number: int
    tensors: tuple[torch.Tensor, ...]
    versions: tuple[int | None, ...]
    step: int
    calls: int = 0


class Branches:
    """The guidance branches of one transformer in one run: a text, and how many forwards of the step had it before.

    A text that is made anew in every step is compared by its values, which waits for the device; others are known by
    their memory.
    """

    def __init__(self) -> None:
        self._texts: list[_Text] = []
        self._made = 0

    def of(self, text: Any, step: int, keep: int) -> tuple[int, int]:
        """The branch of a forward that begins. text: a tensor, several, or none; keep: steps after which one that did
        not come is forgotten.
        """
        tensors = tuple(x for x in (text if isinstance(text, list | tuple) else (text,)) if isinstance(x, torch.Tensor))
        self._texts = [each for each in self._texts if step - keep <= each.step <= step]
        found = next((each for each in self._texts if _is_same(each, tensors)), None)
        found = found or next((each for each in self._texts if _is_equal(each, tensors)), None)
        if found is None:
            found = _Text(self._made, tensors, _versions(tensors), step)
            self._made += 1
            self._texts.append(found)
        if found.step != step:
            found.step, found.calls = step, 0
        found.calls += 1
        return found.number, found.calls


def _versions(tensors: tuple[torch.Tensor, ...]) -> tuple[int | None, ...]:
    """Of every tensor how often it was written to; None where PyTorch does not count."""
    return tuple(None if x.is_inference() else x._version for x in tensors)


def _is_same(text: _Text, tensors: tuple[torch.Tensor, ...]) -> bool:
    if len(text.tensors) != len(tensors) or text.versions != _versions(tensors):
        return False
    return all(same_tensor(a, b) for a, b in zip(text.tensors, tensors, strict=True))


def _is_equal(text: _Text, tensors: tuple[torch.Tensor, ...]) -> bool:
    if len(text.tensors) != len(tensors) or text.versions != _versions(text.tensors):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(text.tensors, tensors, strict=True)
    )
