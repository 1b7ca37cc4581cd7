"""One clip: a pipeline run under one mode of attention, watched step by step, and left as it was."""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...backends import Call, choose
from ...config import SparseConfig, check_choice
from ...pipelines import Handle, RunStats, enable
from ...pipelines.teacache import TeaCacheHandle, enable_teacache
from ..pages.styles import FULL
from .options import FLOOR_KERNELS, KERNELS, ClipError

OnStep = Callable[[int, int, float | None], None]  # (steps done, of how many, density of the last or None)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to run attention.

    name      short and fit for a file name
    label     what a person reads
    configs   one for all transformers of the pipeline, or one each; empty: full attention, the model untouched
    kernel    a name from KERNELS
    teacache  whether steps that change little are skipped; threshold: up to which change, None for the model's own
    """

    name: str
    label: str
    configs: tuple[SparseConfig, ...] = ()
    kernel: str = "default"
    teacache: bool = False
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, tuple(KERNELS))

    @property
    def config(self) -> SparseConfig | None:
        """Of the first transformer, None for full attention."""
        return self.configs[0] if self.configs else None

    def settings(self) -> dict[str, Any]:
        """For JSON, without the label."""
        configs = [config.to_dict() for config in self.configs]
        return {"name": self.name, "kernel": self.kernel, "configs": configs}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is generated under every mode: one prompt from one seed."""

    prompt: str
    seed: int

    def caption(self) -> str:
        return f"“{self.prompt}”, seed {self.seed}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One generation.

    video        [T, 3, H, W], float32 on the CPU, in [0, 1]; a picture has one frame
    seconds      wall clock of the whole pipeline call, device synchronised; of a batch: divided by its clips
    steps        wall clock of every denoising step, as above; the first includes encoding the prompt
    densities    of every step: computed pairs over all pairs, dense calls counted as 1; None where no attention ran
    stats        what ran sparse and dense; None for full attention
    teacache     what TeaCache skipped; summary: what handles say about the run
    peak_memory  bytes allocated on the GPU at most; None on a CPU
    """

    mode: Mode
    pair: Pair
    video: torch.Tensor
    seconds: float
    steps: tuple[float, ...]
    densities: tuple[float | None, ...] = ()
    stats: RunStats | None = None
    teacache: Any = None
    summary: tuple[str, ...] = ()
    peak_memory: int | None = None

    @property
    def density(self) -> float:
        """Computed query-key pairs over all pairs, mean over the sparse calls; 1 for full attention."""
        return 1.0 if self.stats is None else self.stats.density

    @property
    def computed(self) -> float:
        """The same over all calls, those counted as 1 that dense steps and layers run in full."""
        return 1.0 if self.stats is None else self.stats.overall_density

    @property
    def backend(self) -> str:
        """What ran the sparse calls; "" for full attention."""
        return "" if self.stats is None else self.stats.backend


def full_mode() -> Mode:
    """The reference that the other modes are compared with."""
    return Mode(name=FULL, label=FULL)


@contextmanager
def enabled(pipe: Any, mode: Mode, backend: str = "auto") -> Iterator[tuple[Handle | None, TeaCacheHandle | None]]:
    """Inside, the pipeline attends as the mode says. Raises ClipError where that cannot be had; then nothing is on."""
    with ExitStack() as stack:
        stack.enter_context(dense_kernel(mode.kernel))
        sparse = teacache = None
        try:
            if mode.configs:
                sparse = stack.enter_context(enable(pipe, mode.configs, backend=backend))
                for name, config in sparse.configs().items():  # now, not after half the layers ran
                    model = getattr(pipe, name)
                    call = Call(pipe._execution_device, model.dtype, model.config.attention_head_dim, config.block_size)
                    choose(backend, call._replace(precision=config.least_precision))
            if mode.teacache:
                teacache = stack.enter_context(enable_teacache(pipe, threshold=mode.threshold))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ClipError(f"{mode.name}: {error}") from error
        yield sparse, teacache


def generate(
    pipe: Any,
    mode: Mode,
    pairs: Sequence[Pair],
    arguments: Mapping[str, Any],
    *,
    backend: str = "auto",
    on_step: OnStep = lambda done, total, density: None,
) -> list[Clip]:
    """A clip of every pair, all in one call of a diffusers pipeline, which is left as it was; their figures are shared.

    pipe: a pipeline that takes prompt, generator and output_type="pt", and returns `.frames` [B, T, 3, H, W] or
    `.images` [B, 3, H, W] in [0, 1]. arguments: further ones of its call.
    The noise comes from a CPU generator, so a seed means the same noise on every device.
    Raises ClipError where a value is refused, the GPU's memory runs out or a clip is not finite.
    """
    noise = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
    device = pipe._execution_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with enabled(pipe, mode, backend) as (sparse, teacache):
        watch = _Watch(device, sparse, on_step)
        with _explained(pipe), _watched(pipe, watch) as callback:
            output = pipe(
                prompt=[pair.prompt for pair in pairs] if len(pairs) > 1 else pairs[0].prompt,
                **{name: value for name, value in arguments.items() if name != "prompt"},
                generator=noise if len(pairs) > 1 else noise[0],
                output_type="pt",
                **callback,
            )
            videos = output.frames if hasattr(output, "frames") else output.images[:, None]
            seconds = watch.elapsed() / len(pairs)
            videos = videos.float().cpu()
        results: dict[str, Any] = {
            "stats": sparse and sparse.stats(),
            "teacache": teacache and teacache.stats(),
            "summary": tuple(each.summary() for each in (sparse, teacache) if each is not None),
        }
    if not bool(videos.isfinite().all()):
        raise ClipError(
            f"{mode.label}: values came out that are not finite. Use --dtype bfloat16 or float32, and check the "
            "backends with `rectified-spaattn doctor`."
        )
    return [
        Clip(
            mode=mode,
            pair=pair,
            video=video,
            seconds=seconds,
            steps=tuple(each / len(pairs) for each in watch.steps()),
            densities=tuple(watch.densities),
            **results,
            peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )
        for pair, video in zip(pairs, videos, strict=True)
    ]


def check_sparse(clip: Clip) -> None:
    """Raises ClipError where a sparse mode ran no sparse call, saying why and what to change."""
    if clip.stats is not None and not clip.stats.sparse_calls:
        raise ClipError(
            f"{clip.mode.name}: no attention call ran sparse ({clip.stats.dense_reasons}); the comparison would be of "
            "full attention with itself. Use a smaller block_size, more pixels or fewer dense steps and layers."
        )


def warm_up(
    pipe: Any, modes: Sequence[Mode], pair: Pair, arguments: Mapping[str, Any], *, backend: str = "auto"
) -> None:
    """One denoising step under every mode, sparse where the mode is, so that no timed run pays for first-use costs.

    Raises ClipError, also where a mode has nothing sparse.
    """
    one_step = {**arguments, "num_inference_steps": 1}
    for mode in modes:
        sparse = replace(mode, configs=tuple(config.replace(dense_steps=0) for config in mode.configs))
        check_sparse(*generate(pipe, sparse, [pair], one_step, backend=backend))


def dense_kernel(name: str) -> AbstractContextManager[Any]:
    """Inside, scaled_dot_product_attention runs on the kernel of that name only; it raises where that cannot run."""
    kernel = KERNELS[name]
    return nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel))


def check_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ClipError where the kernel does not run on the device."""
    x = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    try:
        with dense_kernel(name):
            scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        kind = str(dtype).removeprefix("torch.")
        raise ClipError(
            f"The SDPA kernel {name!r} does not run {kind} on {device.type} here ({str(error).splitlines()[0]}). Name "
            f"another one with --floor-kernel, such as math; allowed: {', '.join(FLOOR_KERNELS)}."
        ) from error


@contextmanager
def _explained(pipe: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ClipError(f"{type(pipe).__name__}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ClipError(
            f"The GPU's memory ran out: {str(error).splitlines()[0]}\n"
            "Use --offload model (or group, which needs least), a smaller --height and --width, or fewer --frames."
        ) from error


@contextmanager
def _watched(pipe: Any, watch: "_Watch") -> Iterator[dict[str, Any]]:
    """Inside, the watch sees every step of the pipeline; gives the arguments of the call that make it so.

    What takes no callback at the end of a step (HunyuanVideo 1.5) still moves its progress bar there.
    """
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        yield {"callback_on_step_end": watch}
        return
    stock = pipe.progress_bar

    def progress_bar(*iterable: Any, **total: Any) -> Any:
        bar, steps = stock(*iterable, **total), itertools.count()
        move = bar.update

        def update(*moved: Any) -> Any:
            watch(pipe, next(steps), None, {})
            return move(*moved)

        bar.update = update
        return bar

    pipe.progress_bar = progress_bar
    try:
        yield {}
    finally:
        del pipe.progress_bar


class _Watch:
    """A `callback_on_step_end` that notes when every step ended and what its density was.

    Densities are the handle's running figures, less the last.
    """

    def __init__(self, device: torch.device, handle: Handle | None, on_step: OnStep) -> None:
        self._device, self._handle, self._on_step = device, handle, on_step
        self._calls, self._computed = 0, 0.0
        self._ends: list[float] = []
        self.densities: list[float | None] = []
        self._start = self._now()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._ends.append(self.elapsed())
        self.densities.append(self._density())
        self._on_step(step + 1, pipe.num_timesteps, self.densities[-1])
        return tensors

    def elapsed(self) -> float:
        """Seconds since the watch was made, all queued work included."""
        return self._now() - self._start

    def steps(self) -> tuple[float, ...]:
        """Seconds of every step so far."""
        return tuple(end - start for start, end in zip([0.0, *self._ends], self._ends, strict=False))

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _density(self) -> float | None:
        if self._handle is None:
            return 1.0
        stats = self._handle.stats()
        calls = stats.sparse_calls + stats.dense_calls
        computed = 0.0 if math.isnan(stats.overall_density) else stats.overall_density * calls
        if calls < self._calls:  # the pipeline began another round of denoising, and the counts with it
            self._calls, self._computed = 0, 0.0
        new_calls, new_computed = calls - self._calls, computed - self._computed
        self._calls, self._computed = calls, computed
        return new_computed / new_calls if new_calls else None
