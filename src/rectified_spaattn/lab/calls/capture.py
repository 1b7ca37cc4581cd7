"""Take q, k and v out of a running pipeline: what its self-attention layers see at some denoising steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ...attention import SparseStats, rectified_attention
from ...config import SparseConfig
from ...layout import TokenLayout
from ...method.arrange import content_order
from ...orders import Blocks, blocks_of
from ...pipelines.adapters import adapter_for
from ...pipelines.attachment import Attachment, ForwardHooks, attach
from ...pipelines.clock import RunClock
from ...pipelines.enabling import transformers_of
from ...pipelines.forwards import ForwardState
from ...pipelines.masks import key_text_mask
from ...pipelines.processor import check_processor, is_enabled
from ...pipelines.state import LayerState, TransformerState
from ...pipelines.watch import Watch
from ..clips.clip import Pair, full_mode, generate


class CaptureError(RuntimeError):
    """A run did not show what was to be captured, or cannot. The message says why."""


class _EndRun(Exception):
    """Leaves a pipeline early."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One full-attention call, copied to the CPU unless `capture_attention` got another device.

    q          [B, S, H, D], and k, v [B, S, Hk, D], float32, after QK-norm and RoPE, in the model's token order
    text_mask  bool [B, text], True = valid
    layout     of the S tokens
    layer      index among the video self-attention layers, and its name
    step       denoising step, counted from 0
    head       index of the one head that is here, None for all; see `one_head` of lab.calls.maps
    arranged   the tiled tokens of every head are in the order of blocks by content; see `in_order`
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text_mask: torch.Tensor
    layout: TokenLayout
    layer: int
    name: str
    step: int
    head: int | None = None
    arranged: bool = False

    def __str__(self) -> str:
        return f"layer {self.layer}, head {self.head}, denoising step {self.step}"

    def blocks(self, config: SparseConfig) -> Blocks:
        """How `config` cuts this call's tokens into blocks, on the call's device. Raises as blocks_of does."""
        return blocks_of(self.layout, config).on(self.q.device)

    def sparse(self, config: SparseConfig, **options: Any) -> tuple[torch.Tensor, SparseStats]:
        """rectified_attention on this call: its output [B, S, H, D] and its stats; options, errors: as it has them."""
        if self.arranged and config.by_content:
            batch, _, heads, _ = self.k.shape
            options["token_order"] = self.blocks(config).tiled.expand(batch, heads, -1)
        return rectified_attention(
            self.q, self.k, self.v, self.layout, config, text_mask=self.text_mask, return_stats=True, **options
        )

    @property
    def video(self) -> torch.Tensor:
        """int64 [N]: places of the tokens that can be tiled."""
        return self.layout.video_places.to(self.q.device)

    @property
    def valid(self) -> torch.Tensor:
        """bool [B, S], the keys that may be attended to."""
        valid = self.text_mask.new_ones(self.q.shape[:2])
        valid[:, self.layout.text_places.to(valid.device)] = self.text_mask
        return valid

    def in_order(self, config: SparseConfig) -> "AttentionCall":
        """A call of which `blocks(config).tiled` says for all heads alike which token is in which block.

        Where blocks are sorted by content the tokens of every head are put in that order; else it is the call itself.
        """
        if not config.by_content:
            return self
        tiled, scale = self.blocks(config).tiled, self.q.shape[-1] ** -0.5
        order = content_order(self.q, self.k, tiled, block_size=config.block_size, scale=scale)
        q, k, v = (arrange(x, tiled, order) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, arranged=True)


def arrange(x: torch.Tensor, tiled: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, S, H, D] with the tokens of `order`, int64 [B, H or Hk, n], at the places of `tiled`, int64 [n]."""
    moved, order = x.clone(), order.repeat_interleave(x.shape[2] // order.shape[1], dim=1)
    moved[:, tiled] = x.gather(1, order.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1]))
    return moved


@dataclass(kw_only=True, eq=False)
class _Recorder(LayerState):
    """A layer that attends as before and keeps a copy of its first call at each of the wanted steps."""

    steps: Sequence[int]
    layers: Sequence[int] | None
    device: torch.device | str
    calls: list[AttentionCall]
    seen: set[int] = field(default_factory=set)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        step, wanted = self.owner.step, self.layers is None or self.index in self.layers
        # as many keys as queries: not an IP-Adapter's cross-attention from the same processor
        if step is not None and wanted and step in set(self.steps) - self.seen and k.shape[1] == q.shape[1]:
            self.seen.add(step)
            layout = self._layout(q.shape[1])
            valid = key_text_mask(mask, layout)
            if valid is None:
                valid = q.new_ones(q.shape[0], layout.text, dtype=torch.bool)
            self.calls.append(
                AttentionCall(
                    q=self._copy(q.float()),
                    k=self._copy(k.float()),
                    v=self._copy(v.float()),
                    text_mask=self._copy(valid),
                    layout=layout,
                    layer=self.index,
                    name=self.name.partition(".")[2],  # behind that of the transformer
                    step=step,
                )
            )
        return self._dense(q, k, v, mask, scale)

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(self.device, copy=True)


@contextmanager
def capture_attention(
    pipe: Any, *, steps: Sequence[int], layers: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> Iterator[list[AttentionCall]]:
    """Run the pipeline inside, once: the list that is yielded fills with one full-attention call a step and layer.

    pipe: a diffusers pipeline with one or two supported transformers, not enabled. steps: which denoising steps, from
    0. layers: indices of the self-attention layers, None for all. device: where the copies go. The calls come in the
    order of the run. Attention runs in full, and on exit every processor is back. With classifier-free guidance in two
    calls the first of them is kept.

    Raises TypeError for a model without an adapter, ValueError for a layer the model does not have, CaptureError where
    the model is enabled already or a step never ran.
    """
    for _, model in transformers_of(pipe)[0]:
        count = len(adapter_for(model).attentions(model))
        beyond = [index for index in layers or () if not 0 <= index < count]
        if beyond:
            raise ValueError(f"layers: got {beyond}; allowed: 0 to {count - 1}.")
    calls: list[AttentionCall] = []
    with attending(pipe, SparseConfig(), partial(_Recorder, steps=steps, layers=layers, device=device, calls=calls)):
        yield calls
    missing = sorted(set(steps) - {call.step for call in calls})
    if missing:
        raise CaptureError(f"steps: {missing} never ran; allowed: steps of the run, from 0.")


def capture_calls(
    pipe: Any,
    pairs: Sequence[Pair],
    arguments: Mapping[str, Any],
    *,
    steps: Sequence[int],
    layers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda count: None,
) -> list[AttentionCall]:
    """What `capture_attention` fills its list with, from one generation of all pairs that ends after the last step.

    arguments: further ones of the pipeline's call. on_step gets how many steps have run. Raises as `capture_attention`
    and `generate` do.
    """

    def after_step(count: int, total: int, density: float | None) -> None:
        on_step(count)
        if count > max(steps):
            raise _EndRun

    with capture_attention(pipe, steps=steps, layers=layers, device=device) as calls, suppress(_EndRun):
        generate(pipe, full_mode(), pairs, arguments, on_step=after_step)
    return calls


class _Silence(Watch):
    """What an instrument does to a pipeline is no reason to warn."""

    def complaints(self, state: TransformerState, forward: ForwardState) -> list[str]:
        return []


@contextmanager
def attending(pipe: Any, config: SparseConfig, make: Callable[..., LayerState]) -> Iterator[None]:
    """Inside, self-attention of the pipeline's transformers is that of layers of the caller's own.

    make: gives a layer from the fields of LayerState that `attach` fills; config: what its owner holds. On exit every
    processor is back. Raises TypeError and CaptureError as capture_attention.
    """
    clock, attachments = RunClock(pipe), []
    try:
        for name, model in transformers_of(pipe)[0]:
            adapter = adapter_for(model)
            attentions: list[tuple[str, Any]] = adapter.attentions(model)
            if any(is_enabled(module) for _, module in attentions):
                raise CaptureError(f"{name} is enabled; call disable() of its handle first.")
            for layer, module in attentions:
                check_processor(module.processor, layer)
            state = TransformerState(name=name, config=config, backend="auto", clock=clock)
            attachments.append(Attachment(state=state))
            ForwardHooks(attachments[-1], adapter, _Silence()).register(model)
            attach(attentions, state, make)
        yield
    finally:
        for attachment in attachments:
            attachment.detach()
