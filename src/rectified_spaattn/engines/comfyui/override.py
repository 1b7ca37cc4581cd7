"""The seam: an attention override and two wrappers of one patched model, as ComfyUI's ModelPatcher takes them.

Data flow of one call: sampler -> `sample` (a run begins) -> `forward` (a call of the model: its step, its latent) ->
`__call__` (one attention call), which hands on what it leaves dense.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from ...config import SparseConfig
from ..attend import Place, Seam, of_itself
from .tokens import Forward

KEY = "rectified_spaattn"
OVERRIDE = "optimized_attention_override"
SAMPLE, FORWARD = "outer_sample", "diffusion_model"  # the kinds of wrappers, as ComfyUI names them
_NAMES = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of its attention functions, in their order

OUTSIDE = "outside of a forward of the model"
CROSS = "cross-attention"
ELSE = "of other tokens than the video's"


class Override:
    """Sparse attention for one patched model. previous: the override that was there before; dense calls go through it.

    A run's figures stay in `seam.record` until the next run; nothing else outlives a forward, by whatever exit. Clones
    of the patched model, as every later node makes them, share it: ModelPatcher.clone copies its options deeply, and
    the wrappers not.
    """

    def __init__(self, config: SparseConfig, previous: Callable[..., Any] | None = None) -> None:
        self.seam = Seam(config=config)
        self.previous = previous
        self._running: dict[int, Forward] = {}  # by thread

    def __deepcopy__(self, memo: Any) -> "Override":
        return self

    def summary(self) -> str:
        return self.seam.summary()

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one run of a sampler."""
        self.seam.begin_run()
        try:
            return executor(*args, **kwargs)
        finally:
            self.seam.end_run()

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one forward of the model: args are its own, the latent, the timestep and the text first."""
        running, end = self._begin(executor.class_obj, args, kwargs)
        try:
            out = executor(*args, **kwargs)
        finally:
            end()
        self.seam.record.note_forward(running.calls)
        return out

    @torch.compiler.disable
    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Forward, Callable[[], None]]:
        """The forward that begins, and what ends it."""
        thread = threading.get_ident()
        before = self._running.get(thread)
        running = self._running[thread] = _forward_of(model, args, kwargs)
        undo = running.watch()

        @torch.compiler.disable
        def end() -> None:
            for remove in undo:
                remove()
            del self._running[thread]
            if before is not None:
                self._running[thread] = before

        return running, end

    @torch.compiler.disable
    def __call__(
        self, func: Callable[..., Any], q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One attention call. q, k, v: [B, S, H * D], or [B, H, S, D] with skip_reshape; func: what attends densely."""
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        out = self._sparse(q, k, v, heads, given)
        if out is None:
            dense = func if self.previous is None else lambda *a, **b: self.previous(func, *a, **b)  # type: ignore[misc]
            return dense(q, k, v, heads, *args, **kwargs)
        return out.transpose(1, 2) if given.get("skip_output_reshape") else out.flatten(2)

    def _sparse(self, q: Any, k: Any, v: Any, heads: int, given: dict[str, Any]) -> torch.Tensor | None:
        """out [B, S, H, D], or None for a call that must run dense; it is noted then."""
        running, record = self._running.get(threading.get_ident()), self.seam.record
        if running is None:
            record.note_other(OUTSIDE)
            return None
        apart = _apart(q, k, v, heads, given)
        if apart is None:
            record.note_other(CROSS)
            return None
        q, k, v = apart
        layout = running.layout(q.shape[1], q.shape[2] * q.shape[3])
        if layout is None:
            record.note_other(ELSE)
            return None
        place = _place(running, given.get("transformer_options") or {})
        running.calls += 1
        return self.seam.attend(
            q, k, v, layout, place, mask=given.get("mask"), scale=given.get("scale"), masks=running.masks
        )


def patch(model: Any, config: SparseConfig) -> Any:
    """A clone of a ModelPatcher whose video self-attention runs sparse; the model itself and other clones stay as are.

    Overrides of other nodes stay and get the dense calls; a patch of ours is replaced.
    """
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    override = Override(config, previous.previous if isinstance(previous, Override) else previous)
    options[OVERRIDE] = override
    for kind, wrapper in ((SAMPLE, override.sample), (FORWARD, override.forward)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def override_of(model: Any) -> Override | None:
    """What `patch` put on a ModelPatcher or on one that it was cloned from; None without."""
    wrappers = model.get_wrappers(FORWARD, KEY)
    return wrappers[-1].__self__ if wrappers else None


def _apart(q: Any, k: Any, v: Any, heads: int, given: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """q, k, v of a call of self-attention with their heads apart, [B, S, H, D]; None for any other call."""
    if k.shape != v.shape or (q.shape != k.shape and not given.get("enable_gqa")):
        return None
    head = (-1, q.shape[-1] // heads)
    q, k, v = (x.transpose(1, 2) if given.get("skip_reshape") else x.unflatten(2, head) for x in (q, k, v))
    return (q, k, v) if of_itself(q, k, v) else None


def _forward_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
    latent = args[0] if args else kwargs.get("x")
    latent = latent[0] if isinstance(latent, list | tuple) else latent  # audio beside the video
    context = args[2] if len(args) > 2 else kwargs.get("context")
    options = next((each for each in (*args, *kwargs.values()) if isinstance(each, dict) and "sigmas" in each), {})
    step, total = _step(options)
    return Forward(
        model=model,
        latent=tuple(latent.shape[2:]) if isinstance(latent, torch.Tensor) else (),
        context=context.shape[1] if isinstance(context, torch.Tensor) and context.ndim == 3 else None,
        step=step,
        total=total,
    )


def _step(options: dict[str, Any]) -> tuple[int | None, int | None]:
    """(step, number of steps) of the sampler that runs; a second evaluation within a step counts as the step itself."""
    schedule, now = options.get("sample_sigmas"), options.get("sigmas")
    if schedule is None or now is None or len(schedule) < 2:
        return None, None
    total = len(schedule) - 1
    sigma = float(now.flatten()[0])
    reached = int((schedule.cpu() >= sigma * (1 - 1e-4)).sum())
    return min(max(reached - 1, 0), total - 1), total


def _place(running: Forward, options: dict[str, Any]) -> Place:
    """Layers are numbered through, single blocks behind the double ones; calls are counted where they name none."""
    kind, index = options.get("block_type", ""), options.get("block_index")
    window = getattr(options.get("context_window"), "index_list", None)  # frames of a video that is made in parts
    branch = tuple(options.get("cond_or_uncond") or ()), None if window is None else tuple(window)
    when: dict[str, Any] = {"step": running.step, "total": running.total, "branch": branch}
    if index is None:
        return Place(layer=running.calls, name=f"call {running.calls}", **when)
    if kind == "double":
        running.doubles = max(running.doubles, options.get("total_blocks", index + 1))
    layer = index + (running.doubles if kind == "single" else 0)
    return Place(layer=layer, name=f"{kind or 'block'} {index}", **when)
