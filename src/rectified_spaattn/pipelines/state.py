"""What the seam remembers between the forward of a transformer and the attention calls inside it."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import rectified_attention
from ..config import SparseConfig
from ..layout import TokenLayout
from .clock import RunClock
from .tokens import Grid

_handles = itertools.count()


@dataclass(kw_only=True)
class TransformerState:
    """One transformer: its settings, and what its forward is doing now."""

    config: SparseConfig
    backend: str
    clock: RunClock
    text_first: bool
    layers: list["LayerState"] = field(default_factory=list)
    grid: Grid | None = None
    text: int = 0
    padding: int = 0
    step: int | None = None
    total_steps: int | None = None
    run: int = -1
    first_step: int | None = None
    steps_seen: set[int] = field(default_factory=set)
    forwards: int = 0

    def begin_forward(self, grid: Grid, *, text: int = 0, padding: int = 0, timestep: Any = None) -> None:
        """Called before every forward of the transformer, with the timestep that it gets.

        text: number of text tokens in joint attention; padding: how many of them, at the end, are padding in all rows.
        """
        self.grid, self.text, self.padding = grid, text, padding
        self.step, self.total_steps = self.clock.read(timestep)
        self.catch_up()
        if self.first_step is None:
            self.first_step = self.step
        if self.step is not None:
            self.steps_seen.add(self.step)
        self.forwards += 1

    def catch_up(self) -> None:
        """Forget the run before, if a new one has started, on this transformer or another of the pipeline."""
        if self.run == self.clock.run:
            return
        self.run, self.first_step, self.steps_seen, self.forwards = self.clock.run, None, set(), 0
        for layer in self.layers:
            layer.record = Record()

    def warming_up(self) -> bool:
        """Whether this step belongs to the dense ones at the start of this transformer's share of the run."""
        if self.step is None or self.first_step is None:
            return False
        return self.step - self.first_step < self.config.dense_step_count(self.total_steps)


@dataclass
class Record:
    """Calls of one layer in one run. `density` is a running sum that stays on the device: no synchronisation."""

    sparse: int = 0
    density: torch.Tensor | float = 0.0
    dense: Counter[str] = field(default_factory=Counter)
    backends: set[str] = field(default_factory=set)


@dataclass(kw_only=True)
class LayerState:
    """One self-attention layer. `handle` is what compiled code carries in its place: a tensor, so layers share code."""

    index: int
    name: str
    owner: TransformerState
    dense_backend: Any
    handle: torch.Tensor = field(default_factory=lambda: torch.tensor(next(_handles)))
    record: Record = field(default_factory=Record)
    called: bool = False  # in any run: a processor that does without the dispatcher never gets here

    def why_dense(self, layout: TokenLayout) -> str | None:
        config = self.owner.config
        if self.index in config.dense_layers:
            return "dense_layers"
        if self.owner.warming_up():
            return "dense_steps"
        if layout.num_blocks == 0:
            return f"grid {layout.grid} is smaller than one block of {layout.block_size}"
        return None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        """q, k, v: [B, S, H, D] after RoPE; mask: bool [B, 1, 1, S], True = valid, or None. Returns [B, S, H, D]."""
        if k.shape[1] != q.shape[1]:  # an IP-Adapter's cross-attention from the same processor: none of ours
            return self._dense(q, k, v, mask, scale)
        self.called = True
        state = self.owner
        layout = self._layout(q.shape[1])
        reason = self.why_dense(layout)
        if reason is not None:
            self.record.dense[reason] += 1
            return self._dense(q, k, v, mask, scale)
        text_mask = key_text_mask(mask, layout)
        if state.padding:
            layout = self._layout(q.shape[1], state.padding)
            q, k, v = (x[:, : layout.sequence] for x in (q, k, v))
            text_mask = None if text_mask is None else text_mask[:, : layout.text]
        out, stats = rectified_attention(
            q, k, v, layout, state.config, text_mask=text_mask, scale=scale, backend=state.backend, return_stats=True
        )
        self.record.sparse += 1
        self.record.density = self.record.density + stats.device_density
        self.record.backends.add(stats.backend)
        out = out.to(q.dtype)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, state.padding)) if state.padding else out

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=self.dense_backend)

    def _layout(self, sequence: int, padding: int = 0) -> TokenLayout:
        """The layout of all tokens but the last `padding` ones."""
        state = self.owner
        if state.grid is None:
            raise RuntimeError(
                f"{self.name}: attention ran before the transformer's forward. Call the transformer, not its blocks."
            )
        expected = math.prod(state.grid) + state.text
        if sequence != expected:
            raise RuntimeError(
                f"{self.name}: got {sequence} tokens; allowed: {expected}, a grid of {state.grid} and {state.text} of "
                "text. Something adds tokens (reference images, keyframes) or drops them (token merging); disable one "
                "of the two."
            )
        text = state.text - padding
        return TokenLayout.build(state.grid, text, state.text_first, state.config.block_size, state.config.order)


def key_text_mask(mask: torch.Tensor | None, layout: TokenLayout) -> torch.Tensor | None:
    """The text part of a [B, 1, 1, S] key mask: bool [B, text]."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise ValueError(
            f"attention mask: got {mask.dtype} {tuple(mask.shape)}; allowed: bool [B, 1, 1, S], True for a valid key."
        )
    start = 0 if layout.text_first else layout.video
    return mask[:, 0, 0, start : start + layout.text]
