"""One run of a loaded pipeline: enabled, watched step by step, undone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import Call, choose
from ..evaluation.paired import Clip, Mode, Pair, StepClock, full_mode
from ..pipelines import Handle, enable
from ..pipelines.teacache import TeaCacheHandle, enable_teacache
from .request import GenerationError, Request

OnStep = Callable[[int, int, float | None], None]  # (steps done, of how many, density of the last or None)


@dataclass(frozen=True, kw_only=True)
class Enabled:
    """What is on: the handle of rectified attention, and that of TeaCache where it was asked for."""

    handle: Handle
    teacache: TeaCacheHandle | None = None

    def disable(self) -> None:
        if self.teacache is not None:
            self.teacache.disable()
        self.handle.disable()


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """One generation. clip.density: over all calls, dense ones counted as 1.

    densities    of every step: computed pairs over all pairs, dense calls counted as 1; None where no attention ran
    peak_memory  bytes allocated on the GPU at most; None on a CPU
    """

    clip: Clip
    densities: tuple[float | None, ...]
    peak_memory: int | None


def switch_on(pipe: Any, request: Request, device: torch.device) -> Enabled:
    """Rectified attention, TeaCache and compilation as asked for.

    Raises GenerationError where one cannot be had; then none of them stays on.
    """
    with ExitStack() as undo:
        try:
            handle = undo.enter_context(
                enable(pipe, request.configs(), preset=request.preset, backend=request.backend, **request.overrides())
            )
            for name, config in handle.configs().items():  # now, not after the text is encoded and half the layers ran
                model = getattr(pipe, name)
                choose(request.backend, Call(device, model.dtype, model.config.attention_head_dim, config.block_size))
            teacache = None
            if request.teacache:
                teacache = undo.enter_context(enable_teacache(pipe, threshold=request.teacache_threshold))
            if request.compile:
                _compile(pipe)
        except (TypeError, ValueError, RuntimeError) as error:
            raise GenerationError(str(error)) from error
        undo.pop_all()
    return Enabled(handle=handle, teacache=teacache)


def _compile(pipe: Any) -> None:
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is not None:
            model.compile_repeated_blocks(fullgraph=True)


def sparse_mode(request: Request, handle: Handle) -> Mode:
    """How a run with rectified attention is called."""
    config = next(iter(handle.configs().values()))
    cached = " + TeaCache" if request.teacache else ""
    return Mode(name="sparse", label=f"rectified, {config.sparsity:.4g} sparse{cached}", config=config)


def run(
    pipe: Any,
    request: Request,
    arguments: dict[str, Any],
    device: torch.device,
    handle: Handle | None,
    on_step: OnStep = lambda done, total, density: None,
) -> Generated:
    """One generation; with no handle it is called full attention.

    arguments: of the pipeline's call, `image` loaded. The noise comes from a CPU generator, so a seed means the same
    noise on every device. Raises GenerationError where the pipeline refuses a value, the GPU's memory runs out or the
    picture is not finite.
    """
    watch = _Watch(handle, on_step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _explained(pipe, request):
        clock = StepClock(device, watch)
        done = pipe(
            **arguments,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=clock,
        )
        frames = done.frames[0] if hasattr(done, "frames") else done.images[:1]
        seconds = clock.elapsed()
        video = frames.float().cpu()
    if not bool(video.isfinite().all()):
        raise GenerationError(
            f"The {'sparse' if handle else 'full-attention'} run gave values that are not finite. Use --dtype bfloat16 "
            "or float32, and check the backends with `rectified-spaattn doctor`."
        )
    stats = None if handle is None else handle.stats()
    clip = Clip(
        mode=full_mode() if handle is None else sparse_mode(request, handle),
        pair=Pair(prompt=request.prompt, seed=request.seed),
        video=video,
        seconds=seconds,
        steps=clock.steps(),
        density=1.0 if stats is None else stats.overall_density,
        backend="" if stats is None else stats.backend,
    )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Generated(clip=clip, densities=tuple(watch.densities), peak_memory=peak)


class _Watch:
    """A `callback_on_step_end` that reads the density of every step: the handle's running figures, less the last."""

    def __init__(self, handle: Handle | None, on_step: OnStep) -> None:
        self._handle = handle
        self._on_step = on_step
        self._calls, self._computed = 0, 0.0
        self.densities: list[float | None] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.densities.append(self._density())
        self._on_step(step + 1, pipe.num_timesteps, self.densities[-1])
        return tensors

    def _density(self) -> float | None:
        if self._handle is None:
            return 1.0
        stats = self._handle.stats()
        calls = stats.sparse_calls + stats.dense_calls
        computed = stats.overall_density * calls if calls else 0.0
        if calls < self._calls:  # the pipeline began another round of denoising, and the counts with it
            self._calls, self._computed = 0, 0.0
        new_calls, new_computed = calls - self._calls, computed - self._computed
        self._calls, self._computed = calls, computed
        return new_computed / new_calls if new_calls else None


@contextmanager
def _explained(pipe: Any, request: Request) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise GenerationError(f"{type(pipe).__name__}: {error}") from error
    except torch.OutOfMemoryError as error:
        more = {"none": "--offload model, ", "model": "--offload group, ", "group": ""}[request.offload]
        raise GenerationError(
            f"The GPU's memory ran out: {str(error).splitlines()[0]}\n"
            f"Use {more}a smaller --height and --width, or fewer --frames."
        ) from error
