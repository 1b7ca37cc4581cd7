"""Take q, k and v out of a running pipeline: what its self-attention layers see at some denoising steps."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from ...pipelines.enabling import SLOTS
from ...pipelines.processor import check_processor, dense_backend, is_enabled, wrap
from ...pipelines.state import LayerState, RunClock, TransformerState, key_text_mask
from ..clips.clip import Pair, full_mode, generate


class CaptureError(RuntimeError):
    """A run did not show what was to be captured, or cannot. The message says why."""


class _EndRun(Exception):
    """Leaves a pipeline early."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One full-attention call, copied to the CPU unless `capture_attention` got another device.

    q, k, v    [B, S, H, D], float32, after QK-norm and RoPE, in the model's token order
    text_mask  bool [B, text], True = valid
    layout     of the S tokens
    layer      index among the video self-attention layers, and its name
    step       denoising step, counted from 0
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
    arranged: bool = False

    def blocks(self, config: SparseConfig) -> Blocks:
        """How `config` cuts this call's tokens into blocks, on the call's device. Raises as blocks_of does."""
        return blocks_of(self.layout, config).on(self.q.device)

    def sparse(self, config: SparseConfig, **options: Any) -> tuple[torch.Tensor, SparseStats]:
        """rectified_attention on this call: its output [B, S, H, D] and its stats; options, errors: as it has them."""
        if self.arranged and config.by_content:
            batch, _, heads, _ = self.q.shape
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
    """x [B, S, H, D] with the tokens of `order`, int64 [B, H, n], at the places of `tiled`, int64 [n]."""
    moved = x.clone()
    moved[:, tiled] = x.gather(1, order.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1]))
    return moved


@dataclass(kw_only=True)
class _Recorder(LayerState):
    """A layer that attends as before and keeps a copy of its first call at each of the wanted steps."""

    wanted: set[int]
    device: torch.device
    calls: list[AttentionCall]
    seen: set[int] = field(default_factory=set)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        step = self.owner.step
        # as many keys as queries: not an IP-Adapter's cross-attention from the same processor
        if step is not None and step in self.wanted - self.seen and k.shape[1] == q.shape[1]:
            self.seen.add(step)
            self.calls.append(self._call(q, k, v, mask, step))
        return self._dense(q, k, v, mask, scale)

    def _call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, step: int
    ) -> AttentionCall:
        layout = self._layout(q.shape[1])
        valid = key_text_mask(mask, layout)
        if valid is None:
            valid = q.new_ones(q.shape[0], layout.text, dtype=torch.bool)
        q, k, v = (x.detach().float().to(self.device, copy=True) for x in (q, k, v))
        return AttentionCall(
            q=q,
            k=k,
            v=v,
            text_mask=valid.to(self.device, copy=True),
            layout=layout,
            layer=self.index,
            name=self.name,
            step=step,
        )


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
    calls: list[AttentionCall] = []
    recorder = partial(_Recorder, wanted=set(steps), device=torch.device(device), calls=calls)
    with attending(pipe, SparseConfig(), recorder, layers):
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


@contextmanager
def attending(
    pipe: Any, config: SparseConfig, make: Callable[..., LayerState], layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, self-attention of the pipeline's transformers is that of layers of the caller's own.

    make(index=, name=, owner=, dense_backend=) gives a layer; config: what its owner holds; layers: indices in every
    transformer, None for all. On exit every processor is back. Raises as capture_attention.
    """
    clock = RunClock(pipe)
    with ExitStack() as stack:
        for slot in SLOTS:
            model = getattr(pipe, slot, None)
            if model is not None:
                stack.enter_context(_attending(model, clock, config, make, layers))
        yield


@contextmanager
def _attending(
    model: Any, clock: RunClock, config: SparseConfig, make: Callable[..., LayerState], layers: Sequence[int] | None
) -> Iterator[None]:
    adapter = adapter_for(model)
    attentions: list[tuple[str, Any]] = adapter.attentions(model)
    chosen = range(len(attentions)) if layers is None else sorted(set(layers))
    beyond = [index for index in chosen if not 0 <= index < len(attentions)]
    if beyond:
        raise ValueError(f"layers: got {beyond}; allowed: 0 to {len(attentions) - 1}.")
    if any(is_enabled(module) for _, module in attentions):
        raise CaptureError("attention of this pipeline: the model is enabled; call disable() of its handle first.")

    state = TransformerState(config=config, backend="auto", clock=clock, text_first=adapter.text_first)
    originals = []
    signature = inspect.signature(type(model).forward)

    def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = signature.bind_partial(module, *args, **kwargs).arguments
        grid, text = adapter.grid(module, inputs), adapter.text(inputs)
        state.begin_forward(grid, text=text, timestep=inputs.get("timestep"))

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
        state.active = False  # processors that somebody kept are the original ones from here on
        hook.remove()
        for module, processor in originals:
            module.set_processor(processor)
