"""TeaCache on one transformer: hooks around its forward.

The forward is watched with PyTorch's own hooks, not rewritten: offloading puts a forward of its own in place at every
run, and would take ours away. diffusers' registry carries a hook that learns the branch and the end of a run.
"""

import inspect
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import nn

from .blocks import Forward, stand_ins
from .models import CachedModel, Fit
from .state import BranchHook, Progress

CHILD = "rectified_teacache"
"""Name of the empty module under the transformer that carries the hook in diffusers' registry."""


class CachedTransformer:
    """One transformer with TeaCache. record: the last run's forwards by branch, as (step, whether it was computed)."""

    def __init__(
        self, name: str, model: nn.Module, row: CachedModel, fit: Fit, threshold: float, progress: Progress
    ) -> None:
        self.name, self.model, self.row, self.fit = name, model, row, fit
        self.threshold, self.progress = threshold, progress
        self.record: dict[str, list[tuple[int, bool]]] = {}
        self._run = -1
        self._now: tuple[str, int, Forward] | None = None
        self._branches = BranchHook()

        child = nn.Identity()
        HookRegistry.check_if_exists_or_initialize(child).register_hook(self._branches, CHILD)
        model.add_module(CHILD, child)
        _forget_children(model)
        vars(model)["_cache_config"] = fit  # makes diffusers' enable_cache refuse a second cache
        self._watching = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        for watching in self._watching:
            watching.remove()
        vars(self.model).pop("_cache_config", None)
        delattr(self.model, CHILD)
        _forget_children(self.model)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = obstacle(model)
        if found is not None:
            raise RuntimeError(f"TeaCache: {self.name} has {found}, enabled later. Disable one of the two.")
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        timestep = float(torch.as_tensor(inputs["timestep"]).max())
        step, since_start, total = self.progress.read(timestep)
        if self._run != self.progress.run:
            self._run = self.progress.run
            self._branches.forget()
            self.record = {}
        name, branch = self._branches.current()
        if branch.arrive(step, timestep):
            self.record.pop(name, None)
        first, last = self.fit.first_steps, self.fit.last_steps
        forward = Forward(
            branch=branch,
            forced=since_start < first or step >= total - last,
            fit=self.fit,
            threshold=self.threshold,
            signal=self.row.signal,
        )
        self._now = name, step, forward
        # for the length of this forward they hide the lists of blocks; the modules stay where they are
        vars(model).update(stand_ins(model, self.row, forward))

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for blocks in self.row.blocks:
            vars(model).pop(blocks, None)
        if self._now is None:
            return
        (name, step, forward), self._now = self._now, None
        if output is None:  # it raised
            forward.branch.reset()
        else:
            self.record.setdefault(name, []).append((step, not forward.skipped))


def obstacle(model: nn.Module) -> str | None:
    """What is on a transformer that TeaCache does not work with."""
    config = getattr(model, "_cache_config", None)  # set by diffusers' enable_cache, and by us
    if getattr(model, "_is_cached", False):
        return "a cache of cache-dit, and two caches would skip each other's steps"
    if config is not None and not isinstance(config, Fit):
        return f"a cache ({type(config).__name__}), and two caches would skip each other's steps"
    if getattr(model, "_parallel_config", None) is not None:
        return "context parallelism, where each device sees a part of the signal and would decide alone"
    return None


def _forget_children(model: nn.Module) -> None:
    """Let diffusers' registry look for the hooks under the model anew."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
