"""Take q, k and v out of a running pipeline: what its self-attention layers see at one denoising step."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..config import SparseConfig
from ..layout import TokenLayout
from ..method.arrange import arrange, content_order
from ..pipelines.adapters import adapter_for
from ..pipelines.processor import check_processor, dense_backend, wrap
from ..pipelines.state import LayerState, RunClock, TransformerState, key_text_mask
from .paired import Pair, Settings, full_mode, generate


class EndRun(Exception):
    """Raised inside `capture_attention` to leave the pipeline early; it is swallowed there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One full-attention call, copied to the CPU unless capture_attention was told another device.

    q, k, v    [B, S, H, D], float32, after QK-norm and RoPE, in the model's token order
    text_mask  bool [B, text], True = valid
    grid       (T, H, W) in tokens
    layer      index among the video self-attention layers, and its name
    step       denoising step, counted from 0
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text_mask: torch.Tensor
    grid: tuple[int, int, int]
    text_first: bool
    layer: int
    name: str
    step: int

    def layout(self, block_size: int, order: str = "gilbert") -> TokenLayout:
        """The layout of this call's tokens. Raises ValueError as TokenLayout.build does."""
        return TokenLayout.build(self.grid, self.text_mask.shape[1], self.text_first, block_size, order)

    def in_order(self, block_size: int, order: str) -> tuple["AttentionCall", str]:
        """The call and an order in space such that the blocks of all heads are those that `order` gives.

        Where blocks are sorted by content the tokens of every head are in that order, so that the places of Gilbert
        order hold them; else the call is itself. Raises ValueError as TokenLayout.build does.
        """
        layout = self.layout(block_size, order).on(self.q.device)
        if not layout.by_content:
            return self, order
        scale = self.q.shape[-1] ** -0.5
        token_order = content_order(self.q, self.k, layout.tiled, block_size=block_size, scale=scale)
        q, k, v = (arrange(x, layout.tiled, token_order) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v), "gilbert"


@dataclass(kw_only=True)
class _Recorder(LayerState):
    """A layer that attends as before and keeps a copy of its first call at the wanted step."""

    wanted: int
    device: torch.device
    calls: list[AttentionCall]
    done: bool = field(default=False)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        # as many keys as queries: not an IP-Adapter's cross-attention from the same processor
        if self.owner.step == self.wanted and not self.done and k.shape[1] == q.shape[1]:
            self.done = True
            self.calls.append(self._call(q, k, v, mask))
        return self._dense(q, k, v, mask, scale)

    def _call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> AttentionCall:
        layout = self._layout(q.shape[1])
        valid = key_text_mask(mask, layout)
        if valid is None:
            valid = q.new_ones(q.shape[0], layout.text, dtype=torch.bool)
        return AttentionCall(
            **{name: x.detach().float().to(self.device, copy=True) for name, x in (("q", q), ("k", k), ("v", v))},
            text_mask=valid.to(self.device, copy=True),
            grid=layout.grid,
            text_first=layout.text_first,
            layer=self.index,
            name=self.name,
            step=self.wanted,
        )


@contextmanager
def capture_attention(
    pipe: Any, *, step: int, layers: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> Iterator[list[AttentionCall]]:
    """Run the pipeline inside: the list that is yielded fills with one full-attention call a layer, in layer order.

    pipe: a diffusers pipeline with a supported transformer, not enabled. step: which denoising step, from 0. layers:
    indices of the self-attention layers, None for all. device: where the copies go. Attention runs in full, and on
    exit every processor is back. With classifier-free guidance in two calls the first of them is kept.

    Raises TypeError for a model without an adapter, ValueError for a layer the model does not have, RuntimeError where
    the model is enabled already or the step never ran.
    """
    calls: list[AttentionCall] = []
    recorder = partial(_Recorder, wanted=step, device=torch.device(device), calls=calls)
    with attending(pipe, SparseConfig(block_size=16), recorder, layers), suppress(EndRun):
        yield calls
    if not calls:
        raise RuntimeError(f"capture_attention: step {step} never ran inside; allowed: a step of the run, from 0.")


@contextmanager
def attending(
    pipe: Any, config: SparseConfig, make: Callable[..., LayerState], layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, self-attention of the pipeline's transformer is that of layers of the caller's own.

    make(index=, name=, owner=, dense_backend=) gives a layer; config: what its layout is built from; layers: indices,
    None for all. On exit every processor is back. Raises TypeError, ValueError and RuntimeError as capture_attention.
    """
    model = pipe.transformer
    adapter = adapter_for(model)
    attentions: list[tuple[str, Any]] = adapter.attentions(model)
    chosen = range(len(attentions)) if layers is None else sorted(set(layers))
    beyond = [index for index in chosen if not 0 <= index < len(attentions)]
    if beyond:
        raise ValueError(f"layers: got {beyond}; allowed: 0 to {len(attentions) - 1}.")
    if any(hasattr(module.processor, "rectified_layer") for _, module in attentions):
        raise RuntimeError("attention of this pipeline: the model is enabled; call disable() of its handle first.")

    state = TransformerState(config=config, backend="auto", clock=RunClock(pipe), text_first=adapter.text_first)
    originals = []
    signature = inspect.signature(type(model).forward)

    def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = signature.bind_partial(module, *args, **kwargs).arguments
        state.begin_forward(adapter.grid(module, inputs), text=adapter.text(inputs))

    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        for index in chosen:
            name, module = attentions[index]
            check_processor(module.processor, name)
            layer = make(index=index, name=name, owner=state, dense_backend=dense_backend(module.processor))
            originals.append((module, module.processor))
            module.set_processor(wrap(module.processor, layer))
        yield
    finally:
        hook.remove()
        for module, processor in originals:
            module.set_processor(processor)


def end_after(step: int) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that ends the run after `step`; for use inside `capture_attention` only."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index >= step:
            raise EndRun
        return tensors

    return callback


def capture_calls(
    pipe: Any,
    pair: Pair,
    settings: Settings,
    *,
    step: int,
    layers: Sequence[int] | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> list[AttentionCall]:
    """One full-attention call a layer, from a generation that ends after `step`.

    on_step is told how many steps are done. Raises as `capture_attention` and `generate` do.
    """
    end = end_after(step)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(index + 1)
        return end(pipe, index, timestep, tensors)

    with capture_attention(pipe, step=step, layers=layers) as calls:
        generate(pipe, full_mode(), pair, settings, after_step=after_step)
    return calls
