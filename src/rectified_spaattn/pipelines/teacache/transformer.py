"""TeaCache on one transformer: what stands between its caller and its forward.

A step that may be skipped is first tried without its blocks, which costs little and shows how much has changed; if that
is too much, the pass is made again with them. So it is known before each pass whether the blocks run, and torch.compile
sees two plain graphs, of the blocks or of the whole model.

The model gets attributes of its own that are gone after disable(): `_call_impl`, which nn.Module.__call__ calls and
offloading leaves alone (it puts its own `forward` in place at every run). For the length of a call also `forward`,
below all hooks, and for the length of a pass the lists of blocks, which hide the modules that stay where they are.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry
from torch import nn
from torch._dynamo.decorators import skip as uncompiled  # of this frame alone: what it calls may be compiled

from ..enabling import SLOTS
from ..hooks import refuse_pickling
from ..ranks import ranks_of
from .blocks import Pass, stand_ins
from .guidance import Branch, GuidanceCalls, GuidanceHook, Text
from .models import CachedModel, Fit
from .progress import Place, Progress, check_thread

CHILD = "rectified_teacache"
"""Name of the empty module under the transformer that carries the hook in diffusers' registry."""
OWN = ("_call_impl", "_cache_config", "__deepcopy__")
"""Attributes that the model has while TeaCache is on."""


class Marker(nn.Module):
    """The empty module under the transformer. It knows whose it is, and stands in the way of pickling."""

    def __init__(self, owner: "CachedTransformer") -> None:
        super().__init__()
        self.owner = owner

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling("TeaCache", "rsa.disable_teacache(pipe)")


@dataclass(kw_only=True)
class Call:
    """One call of the transformer. residual: what to add in place of the blocks, where they may be left out."""

    name: str
    branch: Branch
    text: Text | None
    place: Place
    residual: torch.Tensor | None
    skipped: bool = False


class CachedTransformer:
    """One transformer with TeaCache. record: the last run by branch, (step, timestep) -> whether it was computed."""

    def __init__(
        self, name: str, model: nn.Module, row: CachedModel, fit: Fit, threshold: float | None, progress: Progress
    ) -> None:
        self.name, self.row, self.fit, self.progress = name, row, fit, progress
        self.threshold = fit.threshold if threshold is None else float(threshold)
        self.kind = type(model).__name__
        self.active = False
        self.record: dict[str, dict[tuple[int, float], bool]] = {}
        self._model: nn.Module | None = model
        self._run = -1
        self._guidance = GuidanceCalls()
        self._hook = GuidanceHook(self._forget)
        # The thread that is inside of a call. No lock: an interrupt at the end of `with lock` would leave it locked.
        self._inside: dict[str, threading.Thread] = {}
        self._call: Call | None = None
        self._hidden: tuple[Any, Any] | None = None  # `forward` of ours, and the instance's own that it hides

    # --- on and off

    def install(self) -> None:
        model = self._alive()
        child = Marker(self)
        HookRegistry.check_if_exists_or_initialize(child).register_hook(self._hook, CHILD)
        model.add_module(CHILD, child)
        _forget_children(model)
        values = vars(model)
        values["_cache_config"] = self.fit  # makes diffusers' enable_cache refuse a second cache
        values["__deepcopy__"] = self.copy_without
        values["_call_impl"] = _entry(self, functools.partial(type(model)._call_impl, model))
        if values.get("_compiled_call_impl") is not None:  # model.compile(...) was called
            values["_compiled_call_impl"] = _entry(self, values["_compiled_call_impl"])
        self.active = True

    def remove(self) -> None:
        """Put the model back, whatever was interrupted, and forget it. Safe to call twice, and halfway installed."""
        if self._model is None:
            return
        self.active = False
        model, values = self._model, vars(self._model)
        self._restore()
        for name in OWN:
            values.pop(name, None)
        inner = getattr(values.get("_compiled_call_impl"), "inner", None)
        if inner is not None:
            values["_compiled_call_impl"] = inner
        if any(name == CHILD for name, _ in model.named_children()):
            delattr(model, CHILD)
        _forget_children(model)
        self._forget()
        self._model = self._call = None
        self._inside.clear()

    def copy_without(self, memo: dict[int, Any]) -> nn.Module:
        """The model's __deepcopy__: a copy that has no TeaCache."""
        model = self._alive()
        _forget_children(model)  # they would be copied, and the hook with them
        own = {name: value for name, value in model.__getstate__().items() if name not in (*OWN, *self.row.blocks)}
        own["_modules"] = {name: child for name, child in own["_modules"].items() if name != CHILD}
        if self._hidden is not None and own.get("forward") is self._hidden[0]:  # inside of a call
            own["forward"] = self._hidden[1]
        if own.get("forward", model) is None:
            del own["forward"]
        copied = type(model).__new__(type(model))
        memo[id(model)] = copied
        copied.__setstate__(copy.deepcopy(own, memo))
        return copied

    def _alive(self) -> nn.Module:
        assert self._model is not None
        return self._model

    def is_on(self, pipeline: Any | None) -> bool:
        """Whether the pipeline, where there is one, has this transformer still."""
        held = [getattr(pipeline, slot, None) for slot in SLOTS]
        return pipeline is None or any(getattr(each, "_orig_mod", each) is self._model for each in held)

    # --- one call

    @torch.compiler.disable
    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward: which step and branch it is, and whether it may be skipped."""
        model = self._alive()
        here = threading.current_thread()
        check_thread(self._inside.setdefault("thread", here))
        self._inside["thread"] = here
        self._restore()  # what an interruption at the very end of the call before may have left
        found = obstacle(model)
        if found is not None:
            raise RuntimeError(f"TeaCache: {self.name} has {found}, enabled later. Disable one of the two.")
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        place = self.progress.read(float(torch.as_tensor(inputs["timestep"]).max()))
        if self._run != place.run:
            self._run = place.run
            self._forget()
            self.record = {}
        self._call = self._opened(place, inputs)
        own = vars(model).get("forward")
        chooser = functools.partial(_choose, self, model.forward)
        self._hidden = chooser, own
        vars(model)["forward"] = chooser

    def _opened(self, place: Place, inputs: dict[str, Any]) -> Call:
        name, text, latents = self._hook.context.name, None, inputs["hidden_states"]
        how = "with one text and several latents" if name is None else f"in cache_context({name!r})"
        try:
            if name is None:
                name, text = self._guidance.unnamed(place, latents, inputs.get("encoder_hidden_states"))
            branch = self._guidance.named(name)
            branch.arrive(place, latents.shape)
        except ValueError:
            raise RuntimeError(
                f"TeaCache: at step {place.step} the transformer was called twice {how}, and the two would share a "
                "cache. Disable TeaCache for this pipeline; in a loop of your own, make each call inside its own "
                "transformer.cache_context('a name')."
            ) from None
        forced = place.since_start < self.fit.first_steps or place.step >= place.total - self.fit.last_steps
        residual = None if forced else branch.residual
        return Call(name=name, branch=branch, text=text, place=place, residual=residual)

    @torch.compiler.disable
    def attempts(self) -> list[torch.Tensor | None]:
        """What is added in place of the blocks, pass by pass until one is enough; None: the blocks run."""
        residual = None if self._call is None else self._call.residual
        return [None] if residual is None else [residual, None]

    @torch.compiler.disable
    def called_here(self) -> bool:
        return self._inside.get("thread") is threading.current_thread()

    @torch.compiler.disable
    def cover(self, residual: torch.Tensor | None) -> Pass:
        """Hide the lists of blocks for one pass. The modules stay where they are."""
        model, now = self._alive(), Pass(residual=residual)
        vars(model).update(stand_ins(model, self.row, now))
        return now

    @torch.compiler.disable
    def uncover(self) -> None:
        if self._model is not None:
            for name in self.row.blocks:
                vars(self._model).pop(name, None)

    @torch.compiler.disable
    def is_enough(self, now: Pass) -> bool:
        """After a pass: whether it will do, which one with the blocks does. What these added is kept."""
        call = self._call
        if call is None or now.signal is None:  # disabled from within the pass
            return True
        signal = now.signal.detach().clone()  # what a CUDA graph gives out lives until the next pass alone
        if now.residual is not None:
            call.skipped = not call.branch.must_compute(signal, self.fit, self.threshold, ranks_of(self._alive()))
            return call.skipped
        if now.start is not None and now.end is not None:
            is_last = call.place.step == call.place.total - 1  # no step is left to need it
            call.branch.computed(signal, None if is_last else (now.end - now.start).detach())
        return True

    @torch.compiler.disable
    def finish(self) -> None:
        """After a forward that went through: it counts."""
        call = self._call
        if call is None:
            return
        moments = self.record.setdefault(call.name, {})
        moments[call.place.step, call.place.timestep] = not call.skipped
        if call.text is not None:
            call.text.calls += 1
        call.branch.open = False

    @torch.compiler.disable
    def leave(self) -> None:
        """After a forward, however it ended."""
        if self._model is not None and self.called_here():
            self._restore()
            self._call = None
            self._inside.clear()

    def _restore(self) -> None:
        values = vars(self._alive())
        self.uncover()
        if self._hidden is None:
            return
        chooser, own = self._hidden
        if values.get("forward") is chooser:
            if own is None:
                del values["forward"]
            else:
                values["forward"] = own
        self._hidden = None

    def _forget(self) -> None:
        self._guidance = GuidanceCalls()


def _entry(cached: CachedTransformer, inner: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for inner, the model's own `_call_impl` or what model.compile() made of it."""

    @uncompiled
    def call(*args: Any, **kwargs: Any) -> Any:
        if not cached.active:  # model.compile() met it while TeaCache was on, and holds on to it
            return inner(*args, **kwargs)
        try:
            cached.enter(args, kwargs)
            output = inner(*args, **kwargs)
            cached.finish()
        finally:  # a forward that was stopped by any means leaves nothing on the model
            cached.leave()
        return output

    call.inner = inner  # type: ignore[attr-defined]
    return call


@uncompiled
def _choose(cached: CachedTransformer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of the model's forward for one call: first without blocks where they may be skipped, then with them."""
    if not cached.called_here():
        return forward(*args, **kwargs)
    for residual in cached.attempts():
        try:
            now = cached.cover(residual)
            output = forward(*args, **kwargs)
        finally:
            cached.uncover()
        if cached.is_enough(now):
            break
    return output


def cached_transformer(model: nn.Module) -> CachedTransformer | None:
    """TeaCache on this model."""
    child = getattr(model, CHILD, None)
    return child.owner if isinstance(child, Marker) else None


def obstacle(model: nn.Module) -> str | None:
    """What is on a transformer that TeaCache does not work with."""
    config = getattr(model, "_cache_config", None)  # set by diffusers' enable_cache, and by us
    if getattr(model, "_is_cached", False):
        return "a cache of cache-dit, and two caches would skip each other's steps"
    if config is not None and not isinstance(config, Fit):
        return f"a cache ({type(config).__name__}), and two caches would skip each other's steps"
    return None


def _forget_children(model: nn.Module) -> None:
    """Let diffusers' registry look for the hooks under the model anew."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
