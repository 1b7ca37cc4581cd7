"""What enabling puts on one transformer, processors and hooks, and takes away again."""

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..budgets import Budgets
from .adapters import Adapter
from .forwards import RunningForwards
from .hooks import Hooks, remove_hooks
from .plans import check_cut
from .processor import dense_backend, original, wrap
from .ranks import ranks_of
from .state import LayerState, TransformerState
from .stats import calls_line, run_stats
from .watch import Watch, lost_layers

_log = logging.getLogger(__name__)


class ForwardHooks(Hooks):
    """Begins and ends the forwards of one transformer, and warns of what does not go as configured."""

    def __init__(self, attachment: "Attachment", adapter: Adapter, watch: Watch) -> None:
        self.attachments, self.state, self.adapter, self.watch = [attachment], attachment.state, adapter, watch
        self.compared: int | None = None  # the run whose latents were compared between processes

    def register(self, model: nn.Module) -> None:
        self.attachments[0].modules.append(weakref.ref(model))
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)

    @torch.compiler.disable  # bookkeeping of each call: not to be traced where the whole transformer is compiled
    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.alive or not self.state.active:
            return
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        layouts, padding = self.adapter.layouts(model, inputs), self.adapter.padding(inputs)
        check_cut(model, self.adapter, layouts, self.state.name)
        ranks, timestep = ranks_of(model), inputs.get(self.adapter.timestep)
        forward = self.state.begin_forward(
            layouts,
            padding=padding,
            timestep=timestep,
            ranks=ranks,
            packed=self.adapter.packed,
            text=inputs.get(self.adapter.text),
        )
        if self.state.count == 1:
            _log.info("%s: a run of %s steps begins, %s", self.state.name, forward.total or "unknown", forward.layout)
        for state in self.watch.states:  # another expert's share of the run may have ended
            state.plans.expire(forward.step)
        if ranks is not None and self.compared != self.state.run:
            self.compared = self.state.run
            ranks.check_same(inputs["hidden_states"], self.state.name)
        _say(self.watch.complaints(self.state, forward))

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.alive or not self.state.active:
            return
        forward = self.state.end_forward(failed=output is None)
        if forward is None or output is None:  # it raised
            return
        self.state.completed = True
        self.state.span.end_forward()
        _log.debug(
            "%s: step %s of %s, %d attention calls, %d of them sparse",
            *(self.state.name, forward.step, forward.total, forward.calls, forward.sparse),
        )
        if not forward.calls and not lost_layers(self.state):
            with self.state.lock:
                self.state.skipped += 1  # every forward calls a layer once, or a cache left it out
        _say(self.watch.complaints_after(self.state, forward))


class RunHook(Hooks):
    """On what runs beside the transformers: whether these are still the ones that were enabled."""

    def __init__(self, attachments: list["Attachment"], watch: Watch) -> None:
        self.attachments, self.watch = attachments, watch

    def register(self, module: nn.Module) -> None:
        self.attachments[0].modules.append(weakref.ref(module))
        module.register_forward_pre_hook(self.look)

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not self.alive:  # a graph, as of vae.decode, must not break here
            return
        for state in self.watch.states:
            state.end_run()
        _say(self.watch.replaced_transformers())


@dataclass(kw_only=True, eq=False)
class Attachment:
    """One enabled transformer. It holds nothing of the model: that holds it, by the hooks."""

    state: TransformerState
    modules: "list[weakref.ref[nn.Module]]" = field(default_factory=list)  # that carry hooks

    def detach(self) -> None:
        """Put the model back as it was, but for processors that somebody replaced since. Safe to call twice."""
        if self.state.active and self.state.count and _log.isEnabledFor(logging.INFO):
            _log.info("disable %s: its last run: %s", self.state.name, calls_line(run_stats([self.state])))
        self.state.active = False
        for layer in self.state.layers:
            module = layer.module()
            if module is not None and getattr(module.processor, "rectified_layer", None) is layer:
                put(module, original(module.processor))
        for module in [each() for each in self.modules]:
            if module is not None:
                remove_hooks(module, self)
        self.state.budgets = Budgets()
        self.state.plans.close()
        self.state.forget_plans()
        self.state.forwards = RunningForwards()  # what an interrupted forward left there leads to the model


def attach(
    attentions: list[tuple[str, Any]], state: TransformerState, make: Callable[..., LayerState] = LayerState
) -> None:
    """Exchange the processors of `attentions`, (name, module) each, for ones that attend through layers of `make`."""
    for index, (name, module) in enumerate(attentions):
        layer = make(
            index=index,
            name=f"{state.name}.{name}",
            owner=state,
            dense_backend=dense_backend(module.processor),
            module=weakref.ref(module),
        )
        state.layers.append(layer)
        put(module, wrap(module.processor, layer))


def put(module: Any, processor: Any) -> None:
    """Give an attention module a processor; Mochi's has no method for it."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _say(complaints: list[str]) -> None:
    for complaint in complaints:
        warnings.warn(f"rectified_spaattn: {complaint}", stacklevel=4)
