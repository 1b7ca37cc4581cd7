"""Which tokens a self-attention call of one of ComfyUI's models holds, as seen in the forward that makes it.

ComfyUI rewrites its models monthly, so nothing is assumed of where text stands: the modules that embed the latents tell
how many tokens those became, and the ids that a model gives to its rotary embedder tell which end of the sequence is
text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn

from ...layout import Grid, TokenLayout
from ..masks import Masks


@dataclass(frozen=True, kw_only=True)
class Row:
    """What must be known of one model class.

    embedders  modules that make tokens of latents, references and context latents too; those it lacks are left out
    ids        the rotary embedder that gets the ids [B, S, axes] of text and latents; empty: text is none of the
               self-attention's tokens
    patch      (T, H, W), where the model has no `patch_size`
    """

    embedders: tuple[str, ...]
    ids: str = ""
    patch: tuple[int, ...] = ()


_JOINT = Row(embedders=("img_in",), ids="pe_embedder")
_LTX = Row(embedders=("patchify_proj",), patch=(1, 1, 1))

ROWS: dict[str, Row] = {
    "WanModel": Row(
        embedders=(
            "patch_embedding",
            "ref_conv",
            *(f"frame_packer.{name}" for name in ("proj", "proj_2x", "proj_4x")),
        )
    ),
    "HunyuanVideo": _JOINT,
    "LTXVModel": _LTX,
    "LTXBaseModel": _LTX,
    "Flux": _JOINT,
    "Chroma": _JOINT,
    "QwenImageTransformer2DModel": _JOINT,
}


def row_of(model: Any) -> Row | None:
    """The row of a model's class or of one it is derived from; None without any."""
    return next((ROWS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in ROWS), None)


@dataclass(kw_only=True, eq=False)
class Forward:
    """One forward of the model.

    latent   T, H, W or H, W of what it denoises
    context  length of the text that it was called with, None: nobody knows it
    tokens   how many tokens the embedders gave so far; width: their channels
    ids      what the rotary embedder got
    calls    of the video's self-attention so far
    doubles  number of its double blocks, once it told them
    """

    model: Any
    latent: tuple[int, ...]
    context: int | None
    step: int | None
    total: int | None
    tokens: int = 0
    width: int | None = None
    ids: torch.Tensor | None = None
    calls: int = 0
    doubles: int = 0
    masks: Masks = field(default_factory=Masks)
    known: dict[int, TokenLayout | str] = field(default_factory=dict)

    @property
    def row(self) -> Row | None:
        return row_of(self.model)

    def watch(self) -> list[Callable[[], None]]:
        """Looks at the embedders until all that is returned was called."""
        row = self.row
        if row is None:
            return []
        handles = [part.register_forward_hook(self._embedded) for part in _parts(self.model, row.embedders)]
        handles += [part.register_forward_pre_hook(self._placed) for part in _parts(self.model, (row.ids,))]
        return [handle.remove for handle in handles]

    def _embedded(self, module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        self.tokens += out.shape[1] if out.ndim == 3 else out[0, 0].numel()  # [B, N, C] or [B, C, ...]
        self.width = out.shape[-1 if out.ndim == 3 else 1]

    def _placed(self, module: nn.Module, inputs: Any) -> None:
        self.ids = inputs[0]

    def layout(self, sequence: int, width: int) -> TokenLayout | str | None:
        """Of a call with as many queries as keys; the reason where nobody knows; None: it is not the video's.

        sequence: S; width: heads times their size.
        """
        if self.row is None:
            grid = grid_of(self.model, self.latent)
            if grid is None:
                return f"{type(self.model).__name__}, whose tokens are unknown"
            return self._whole(sequence, grid)
        if not self.tokens:
            return f"{type(self.model).__name__} without {' or '.join(self.row.embedders)}, so of unknown tokens"
        if width != self.width or sequence < self.tokens:
            return None
        if not self.row.ids:
            return self._whole(sequence, grid_of(self.model, self.latent))
        if sequence not in self.known:
            self.known[sequence] = self._joint(sequence)
        return self.known[sequence]

    def _whole(self, sequence: int, grid: Grid | None) -> TokenLayout | str | None:
        """Where text has no part in self-attention."""
        count = self.tokens or _count(grid)
        if self.row is None and sequence > count:
            return f"{type(self.model).__name__}, whose {sequence - count} tokens beside the latent's are unknown"
        if sequence != count:
            return None
        if sequence == self.context:
            return f"{sequence} tokens of text and of video, which nobody can tell apart"
        return _layout(sequence, (0, sequence), grid)

    def _joint(self, sequence: int) -> TokenLayout | str:
        """Where text stands before or behind the latents."""
        text = sequence - self.tokens
        span = (0, sequence)
        if text:
            ids = self.ids
            if ids is None or ids.ndim != 3 or ids.shape[1] != sequence:
                return f"{text} tokens beside the {self.tokens} of the latents, of unknown places"
            first, last = _is_text(ids[0, :text]), _is_text(ids[0, -text:])
            if first == last:
                return (
                    f"{text} tokens beside the {self.tokens} of the latents, which look like text on both ends or none"
                )
            span = (text, sequence) if first else (0, self.tokens)
        return _layout(sequence, span, grid_of(self.model, self.latent))


def grid_of(model: Any, latent: tuple[int, ...]) -> Grid | None:
    """(T, H, W) in tokens of a latent that the model cuts into patches; None where it does not say how."""
    row = row_of(model)
    patch = (row.patch if row else ()) or getattr(model, "patch_size", None)
    if isinstance(patch, int):
        patch = (1, patch, patch)[-len(latent) :]
    if not isinstance(patch, list | tuple) or len(patch) != len(latent) or not 2 <= len(latent) <= 3:
        return None
    sides = [-(-length // side) for length, side in zip(latent, patch, strict=True)]
    t, h, w = (1, *sides)[-3:]
    return t, h, w


def _parts(model: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules of these dotted names that there are."""
    found = (reduce(lambda part, name: getattr(part, name, None), name.split("."), model) for name in names)
    return [part for part in found if isinstance(part, nn.Module)]


def _count(grid: Grid | None) -> int:
    return grid[0] * grid[1] * grid[2] if grid else 0


def _layout(sequence: int, span: tuple[int, int], grid: Grid | None) -> TokenLayout:
    """The tokens of `span` can be tiled; they lie in the grid where they are as many as it has."""
    if grid is not None and _count(grid) == span[1] - span[0]:
        return TokenLayout(sequence=sequence, spans=(span,), grid=grid, grid_start=span[0])
    return TokenLayout(sequence=sequence, spans=(span,))


def _is_text(ids: torch.Tensor) -> bool:
    """Whether tokens lie on no plane of an image: row and column are one number. Waits for the device.

    ids: [L, axes]: frame, row, column and maybe more; or row, column.
    """
    row, column = (ids[:, 1], ids[:, 2]) if ids.shape[-1] > 2 else (ids[:, 0], ids[:, 1])
    return bool((row == column).all())
