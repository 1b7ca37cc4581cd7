"""The seam: a backend in diffusers' dispatcher, and processors that tell it which layer calls.

Data flow of one call: wrapped processor -> dispatch_attention_fn -> our backend -> the op `rectified_spaattn::layer`,
which looks up the LayerState behind the layer's handle. The op is opaque to torch.compile, so the step, the grid and
the schedule may change without a recompilation; the handle is a tensor, so all layers share one compiled block.
"""

import copy
import functools
import sys
import threading
import weakref
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
)
from torch.overrides import _get_current_function_mode_stack

from ..ops import TAGS
from .hooks import refuse_pickling
from .ranks import context_parallel
from .redirect import REDIRECTED, Redirected
from .stand_ins import CUT, STAND_INS
from .state import LayerState

BACKEND_NAME = "rectified_spaattn"

_layers: "weakref.WeakValueDictionary[int, LayerState]" = weakref.WeakValueDictionary()


class _Caller(threading.local):
    """Of the layer whose processor is running in this thread the handle, and its heads as LayerState has them."""

    handle: torch.Tensor | None = None
    heads: torch.Tensor | None = None


_caller = _Caller()


@torch.library.custom_op("rectified_spaattn::layer", mutates_args=(), **TAGS)
def layer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """q: [B, S, H, D]; k, v: [B, S, Hk, D]; mask: of keys, or None; handle: int64 scalar on the CPU. Returns out."""
    return _layer_of(handle).attend(q, k, v, mask, scale).contiguous()


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    """Raised where compiled code wants a gradient, or code that is cut over processes: dense calls have none, too."""
    raise RuntimeError(
        "Compiled code of a model with rectified attention, and one that is cut over processes, is for inference and "
        "has no gradient. Call the model inside torch.no_grad(); to train, call disable() first."
    )


layer_attention.register_autograd(_no_gradient)


def _layer_of(handle: torch.Tensor) -> LayerState:
    layer = _layers.get(int(handle))
    if layer is None:
        raise RuntimeError(
            "Rectified attention was disabled, but code compiled while it was enabled still runs. "
            "Call torch.compiler.reset() and compile again after disable()."
        )
    return layer


@layer_attention.register_fake
def _layer_attention_fake(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


def _backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """What dispatch_attention_fn calls for a wrapped processor."""
    handle = _caller.handle
    if handle is None:
        raise RuntimeError(
            f"The attention backend {BACKEND_NAME!r} was called by a processor it was not enabled for. "
            "Do not set the backend by its name: disable, transformer.set_attention_backend('native'), and "
            "rectified_spaattn.enable(pipe)."
        )
    if any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack()):
        if not torch.compiler.is_compiling():
            _layer_of(handle).called = True
        return value  # perturbed attention guidance: what the dense dispatch gives inside this mode
    if dropout_p or is_causal:
        raise ValueError(
            f"rectified attention: got dropout_p={dropout_p}, is_causal={is_causal}; allowed: 0, False. Disable it on "
            "this model."
        )
    query, key, value = (_autocast(x) for x in (query, key, value))
    if _parallel_config is None:
        return _attend(query, key, value, attn_mask, handle, scale)
    if key.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"rectified attention: got {key.shape[2]} key heads for {query.shape[2]} query heads in a model cut "
            "over processes; allowed: as many, since diffusers exchanges no others. Run it in one process."
        )

    # q, k, v there: all tokens of this rank's heads. The mask stays as it came: our layer knows which tokens it is of.
    def attend_to_all(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return _attend(q, k, v, attn_mask, handle, scale)

    heads = _caller.heads
    if heads is not None:
        query, key, value = (x.index_select(2, heads[0]) for x in (query, key, value))
    out = _templated_context_parallel_attention(
        query, key, value, scale=scale, forward_op=attend_to_all, backward_op=_no_gradient,
        _parallel_config=_parallel_config,
    )  # fmt: skip
    return out if heads is None else out.index_select(2, heads[1])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return layer_attention(q, k, v, mask, handle, scale)
    return _layer_of(handle).attend(q, k, v, mask, scale)  # no op between: dense calls have a gradient


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """As torch.autocast casts the inputs of scaled_dot_product_attention."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


@functools.cache
def backend_member() -> AttentionBackendName:
    """Our member of diffusers' closed enum of backends, registered the first time it is asked for."""
    member = _with_our_name(AttentionBackendName)
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(_backend)
    return member


@functools.cache
def _wrapped_class(processor_class: Any) -> Any:
    """A subclass that names its layer while its __call__ runs; modules read its signature, hence wraps."""
    base = STAND_INS.get(processor_class, processor_class)
    redirected = processor_class in REDIRECTED

    @functools.wraps(base.__call__)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.rectified_layer
        if layer is None:  # made by somebody from our class, as load_ip_adapter does: the stock one
            return processor_class.__call__(self, attn, *args, **kwargs)
        ours = layer.owner.active and self._attention_backend is self.rectified_backend
        # compiled code is of one module, whose processor this is
        if not ours or not (torch.compiler.is_compiling() or _is_of(layer, attn)):
            return original(self)(attn, *args, **kwargs)
        before = _caller.handle, _caller.heads
        _caller.handle, _caller.heads = self.rectified_handle, layer.heads
        try:
            if not redirected:
                return base.__call__(self, attn, *args, **kwargs)
            with Redirected(self._attention_backend, self._parallel_config):
                return base.__call__(self, attn, *args, **kwargs)
        finally:
            _caller.handle, _caller.heads = before

    members: dict[str, Any] = {
        "__call__": call,
        "__module__": __name__,
        "__copy__": _copied,
        "__deepcopy__": _deeply_copied,
        "__reduce_ex__": _pickled,
        "rectified_handle": None,
        "rectified_layer": None,
        "rectified_stock": processor_class,
        "rectified_backend": backend_member(),
    }
    if redirected:
        members |= {"_attention_backend": None, "_parallel_config": None}
    wrapped = type(processor_class.__name__, (base,), members)
    AttentionProcessorRegistry._register()  # it fills itself when first asked
    if processor_class in AttentionProcessorRegistry._registry:  # skip-layer guidance looks processors up by class
        AttentionProcessorRegistry.register(wrapped, AttentionProcessorRegistry.get(processor_class))
    return wrapped


def _is_of(layer: LayerState, module: Any) -> bool:
    own = layer.module()
    return own is None or own is module


def _copied(self: Any) -> Any:
    return copy.copy(original(self))


def _deeply_copied(self: Any, memo: dict[int, Any]) -> Any:
    return copy.deepcopy(original(self), memo)


def _pickled(self: Any, protocol: Any) -> Any:
    if self.rectified_layer is not None and self.rectified_layer.owner.active:
        refuse_pickling()
    return copy.copy, (original(self),)


def wrap(processor: Any, layer: LayerState) -> Any:
    """A copy of `processor` that attends through `layer`; the original stays as it is."""
    processor = original(processor)
    tell_cache_dit()
    wrapped = copy.copy(processor)
    wrapped.__class__ = _wrapped_class(processor.__class__)
    wrapped._attention_backend = backend_member()
    if type(processor) in STAND_INS:  # which enable_parallelism left alone
        model: Any = layer.owner.model()
        wrapped._parallel_config = None if context_parallel(model) is None else model._parallel_config
    wrapped.rectified_handle = layer.handle
    layer.masks_text_only = getattr(wrapped, "masks_text_only", False)
    wrapped.rectified_layer = layer  # keeps the layer alive as long as its processor
    wrapped.rectified_original = (processor,)  # in a tuple: a module by itself would become a part of the wrapped one
    _layers[int(layer.handle)] = layer
    return wrapped


def original(processor: Any) -> Any:
    """The processor that a wrapped one was made from, with what was set on it meanwhile; any other one is itself.

    On a model that is cut over processes it is one that can be.
    """
    stock_class = getattr(processor, "rectified_stock", None)
    if stock_class is None:
        return processor
    if processor.rectified_layer is None:  # made by somebody from our class
        made = object.__new__(stock_class)
        vars(made).update(vars(processor))
        return made
    (stock,) = processor.rectified_original
    if processor._attention_backend is not backend_member() and hasattr(stock, "_attention_backend"):
        stock._attention_backend = processor._attention_backend  # by set_attention_backend
    config = getattr(processor, "_parallel_config", None)  # by enable_parallelism
    if config is not None:
        stock = cut_processor(stock)
    if getattr(stock, "_parallel_config", None) is not config:
        stock._parallel_config = config
    return stock


def cut_processor(processor: Any) -> Any:
    """The same processor, or in place of one that is wrong on a part of the tokens one that is right."""
    if type(processor) not in CUT:
        return processor
    made = object.__new__(CUT[type(processor)])
    vars(made).update(vars(processor))
    return made


def check_processor(processor: Any, name: str) -> None:
    """Raises TypeError for a processor whose attention cannot be redirected."""
    processor = original(processor)
    known = type(processor) in STAND_INS or type(processor) in REDIRECTED
    if not known and not hasattr(processor, "_attention_backend"):
        raise TypeError(
            f"{name}: got a {type(processor).__name__}, which calls its attention itself; allowed: a processor that "
            "uses diffusers' dispatch_attention_fn. Put the model's own processor back, then enable."
        )


def dense_backend(processor: Any) -> Any:
    """What a processor attends with when it is left alone: for a stand-in's original, PyTorch's own attention."""
    return getattr(original(processor), "_attention_backend", AttentionBackendName.NATIVE)


def is_wrapped(processor: Any, layer: LayerState) -> bool:
    """Whether `processor` is still the one that attends through `layer`."""
    return getattr(processor, "rectified_layer", None) is layer and processor._attention_backend is backend_member()


def is_enabled(module: Any) -> bool:
    """Whether the processor of an attention module is one of ours that works there."""
    layer = getattr(module.processor, "rectified_layer", None)
    return layer is not None and layer.owner.active and _is_of(layer, module)


def tell_cache_dit() -> None:
    """Our name in the enum in which cache-dit's own processors look up a backend, where that package is loaded.

    Its registry then hands the call on to the row of the same name in diffusers' dispatcher.
    """
    register = sys.modules.get("cache_dit.attention.backends.register")
    if register is None or BACKEND_NAME in register._AttnBackend._value2member_map_:
        return
    _with_our_name(register._AttnBackend)


def _with_our_name(kind: Any) -> Any:
    """A closed enum of strings gets a member of our name."""
    member = str.__new__(kind, BACKEND_NAME)
    member._name_, member._value_ = BACKEND_NAME.upper(), BACKEND_NAME
    kind._member_map_[member._name_] = member
    kind._value2member_map_[BACKEND_NAME] = member
    kind._member_names_.append(member._name_)
    return member
