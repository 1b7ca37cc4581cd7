"""The forwards of a transformer that are running: what each of them knows, from its beginning to its end."""

import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..kept_plans import Moment
from ..layout import TokenLayout
from .branches import MOST
from .masks import KeyMasks
from .ranks import Ranks

_MODULE_CODE = nn.Module._call_impl.__code__.co_filename


@dataclass(kw_only=True, eq=False)
class ForwardState:
    """One forward of a transformer.

    layouts      that its calls may have, told apart by their length, padding included; the first is of most calls
    padding      how many tokens, at the end of the first, are padding in all rows
    ranks        the processes that share it, and streams, of every layout the lengths of what was cut between them;
                 None: one process
    step, total  the denoising step and the number of steps; None where nobody knows
    turn         how many forwards this step had before: guidance calls come in the same order at every step
    branch       which guidance branch it is, as in Branches; None where nobody asks, and where nobody can tell
    problem      why the step is unknown
    why_dense    why every call in it is dense; None where calls may be sparse
    shared       sparse calls that other ranks have a part in: the layer; of this rank's heads the density, and how many
                 blocks each keeps, float32 [1 + H]
    calls        attention calls so far; sparse: those of them that were sparse; density: their sum, on the device
    """

    layouts: tuple[TokenLayout, ...]
    padding: int = 0
    ranks: Ranks | None = None
    streams: tuple[tuple[int, ...], ...] = ()
    step: int | None = None
    total: int | None = None
    turn: int = 0
    branch: tuple[int, int] | None = None
    problem: str = ""
    why_dense: str | None = None
    calls: int = 0
    sparse: int = 0
    density: torch.Tensor | float = 0.0
    shared: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    call: FrameType = field(default_factory=lambda: innermost_call())

    @property
    def layout(self) -> TokenLayout:
        """Of most calls."""
        return self.layouts[0]

    def layout_of(self, sequence: int) -> TokenLayout | None:
        """Of a call over so many tokens; None where there is none."""
        return next((layout for layout in self.layouts if layout.sequence == sequence), None)

    def unpadded(self, layout: TokenLayout) -> TokenLayout:
        """A layout of this forward in which padding takes no part."""
        return self._unpadded if self.padding and layout is self.layout else layout

    @cached_property
    def _unpadded(self) -> TokenLayout:
        return self.layout.padded(self.padding)

    def moment(self, layer: int, heads: torch.Tensor | None) -> Moment:
        """Of a call of a layer; heads: as LayerState has them."""
        problem = f"the step is unknown: {self.problem}" if self.step is None else ""
        if self.step is not None and self.branch is None:
            problem = f"they are of forwards after the first {MOST} of a step"
        return Moment(layer=layer, branch=self.branch, step=self.step, total=self.total, problem=problem, heads=heads)

    def masks(self, layout: TokenLayout) -> KeyMasks:
        """What the masks of calls with a layout of this forward say."""
        index = next(i for i, each in enumerate(self.layouts) if each is layout)
        return self._masks[index]

    @cached_property
    def _masks(self) -> tuple[KeyMasks, ...]:
        streams = self.streams or ((),) * len(self.layouts)
        return tuple(
            KeyMasks(layout=layout, ranks=self.ranks, streams=each)
            for layout, each in zip(self.layouts, streams, strict=True)
        )


class RunningForwards(threading.local):
    """The forwards of one transformer that run in this thread; the innermost is the last.

    A forward has ended when the Python call it belongs to is no longer on this thread's stack. PyTorch's hooks alone
    cannot tell: a forward hook with always_call is left out where a KeyboardInterrupt, or any other BaseException that
    is no Exception, ends the forward. A wrapper in place of model.forward could, but offloading puts its own forward
    there at every run and takes ours away; and a subclass in place of the model's class is unknown to diffusers.
    """

    def __init__(self) -> None:
        self._stack: list[ForwardState] = []
        self._stopped = False

    def begin(self, forward: ForwardState) -> None:
        self._drop_ended()
        self._stack.append(forward)

    def current(self) -> ForwardState | None:
        self._drop_ended()
        return self._stack[-1] if self._stack else None

    def end(self) -> ForwardState | None:
        """Called from a forward hook: ends the forward it belongs to and gives it; None where that ended before."""
        self._drop_ended()
        if self._stack and self._stack[-1].call is innermost_call():
            return self._stack.pop()
        return None

    def was_stopped(self) -> bool:
        """Whether a forward was interrupted, by whatever no forward hook is told of, since this was asked last."""
        self._drop_ended()
        stopped, self._stopped = self._stopped, False
        return stopped

    def _drop_ended(self) -> None:
        while self._stack and not _is_running(self._stack[-1].call):
            self._stack.pop()
            self._stopped = True


def innermost_call() -> FrameType:
    """The Python frame in which the innermost module of this thread is being called."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _MODULE_CODE:
        frame = frame.f_back
    if frame is None:
        raise RuntimeError("A forward begins outside of a module's call. Call the transformer, not its hooks.")
    return frame


def _is_running(call: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is call
