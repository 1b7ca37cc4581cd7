"""Paired generation: the same prompts and seeds under several attention modes, timed one by one."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import SparseConfig

FULL = "full"
# What runs scaled_dot_product_attention, for dense attention and for the blocks that the torch backend gathers.
DENSE_KERNELS: dict[str, SDPBackend | None] = {
    "default": None,  # PyTorch's own choice
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class NothingSparseError(RuntimeError):
    """A sparse mode ran no sparse call. The message says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to run attention.

    name    short and fit for a file name
    label   what a person reads
    config  None: full attention, the model untouched
    more    configs of further transformers of the pipeline; empty: `config` for all
    kernel  a name from DENSE_KERNELS
    """

    name: str
    label: str
    config: SparseConfig | None
    more: tuple[SparseConfig, ...] = ()
    kernel: str = "default"

    def __post_init__(self) -> None:
        if self.kernel not in DENSE_KERNELS:
            raise ValueError(f"kernel: got {self.kernel!r}; allowed: one of {list(DENSE_KERNELS)}.")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is generated under every mode: one prompt from one seed."""

    prompt: str
    seed: int

    def caption(self) -> str:
        return f"“{self.prompt}”, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all generations have in common. Sizes in pixels. arguments: further ones of the pipeline's call."""

    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One generation.

    video    [T, 3, H, W], float32 on the CPU, in [0, 1]
    seconds  wall clock of the whole pipeline call, device synchronised; of a batch: divided by its clips
    steps    wall clock of every denoising step, as above; the first includes encoding the prompt
    density  computed query-key pairs over all pairs, mean over the sparse calls; 1 for full attention
    overall  the same over all calls, those counted as 1 that dense steps and layers run in full
    backend  what ran the sparse calls; "" for full attention
    """

    mode: Mode
    pair: Pair
    video: torch.Tensor
    seconds: float
    steps: tuple[float, ...]
    density: float
    backend: str
    overall: float = 1.0


OnStep = Callable[[Mode, Pair, int], None]  # (mode, pair, steps done so far)


def full_mode() -> Mode:
    """The reference that the other modes are compared with."""
    return Mode(name=FULL, label="full attention", config=None)


def generate(
    pipe: Any,
    mode: Mode,
    pair: Pair,
    settings: Settings,
    *,
    backend: str = "auto",
    after_step: Callable[..., dict[str, Any]] | None = None,
) -> Clip:
    """One generation with a diffusers pipeline, which is left as it was.

    pipe: a pipeline that takes prompt, height, width, num_frames, num_inference_steps, guidance_scale, generator,
    output_type="pt" and callback_on_step_end, and returns `.frames` [B, T, 3, H, W] in [0, 1].
    after_step: a `callback_on_step_end` in diffusers' terms.
    The noise comes from a CPU generator, so a seed means the same noise on every device.
    Raises NothingSparseError where a sparse mode ran no sparse call, and what `enable` and the pipeline raise.
    """
    return generate_batch(pipe, mode, [pair], settings, backend=backend, after_step=after_step)[0]


def generate_batch(
    pipe: Any,
    mode: Mode,
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    backend: str = "auto",
    after_step: Callable[..., dict[str, Any]] | None = None,
) -> list[Clip]:
    """As `generate`, all pairs in one call of the pipeline; their density is the mean of the batch."""
    with ExitStack() as stack:
        stack.enter_context(_without_progress_bar(pipe))
        stack.enter_context(dense_kernel(mode.kernel))
        handle = None
        if mode.config is not None:
            from ..pipelines import enable

            configs = (mode.config, *mode.more)
            handle = stack.enter_context(enable(pipe, configs if mode.more else mode.config, backend=backend))
        noise = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
        clock = StepClock(pipe._execution_device, after_step)
        frames = pipe(
            [pair.prompt for pair in pairs] if len(pairs) > 1 else pairs[0].prompt,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=noise if len(pairs) > 1 else noise[0],
            output_type="pt",
            callback_on_step_end=clock,
            **settings.arguments,
        ).frames
        seconds = clock.elapsed() / len(pairs)
        steps = tuple(each / len(pairs) for each in clock.steps())
        stats = handle.stats() if handle is not None else None
    if stats is not None and not stats.sparse_calls:
        raise NothingSparseError(
            f"{mode.name}: no attention call ran sparse ({stats.dense_reasons}); the comparison would be of full "
            "attention with itself. Use a smaller block_size, more pixels or fewer dense steps and layers."
        )
    return [
        Clip(
            mode=mode,
            pair=pair,
            video=video.float().cpu(),
            seconds=seconds,
            steps=steps,
            density=1.0 if stats is None else stats.density,
            backend="" if stats is None else stats.backend,
            overall=1.0 if stats is None else stats.overall_density,
        )
        for pair, video in zip(pairs, frames, strict=True)
    ]


def dense_kernel(name: str) -> AbstractContextManager[Any]:
    """Inside, scaled_dot_product_attention runs on the kernel of that name only; it raises where that cannot run."""
    backend = DENSE_KERNELS[name]
    return nullcontext() if backend is None else sdpa_kernel(backend)


def warm_up(pipe: Any, modes: Sequence[Mode], pair: Pair, settings: Settings, *, backend: str = "auto") -> None:
    """One denoising step under every mode, sparse where the mode is, so that no timed run pays for first-use costs."""
    for mode in modes:
        generate(pipe, _without_dense_steps(mode), pair, replace(settings, steps=1), backend=backend)


def generate_pairs(
    pipe: Any,
    modes: Sequence[Mode],
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    backend: str = "auto",
    on_step: OnStep | None = None,
) -> list[Clip]:
    """Every pair under every mode, pair after pair, so that a busy machine disturbs all modes alike.

    Nothing is warmed up here: call `warm_up` first. Raises as `generate` does.
    """
    clips = []
    for pair in pairs:
        for mode in modes:
            if on_step is not None:
                on_step(mode, pair, 0)
            watch = None if on_step is None else partial(_after_step, on_step, mode, pair)
            clips.append(generate(pipe, mode, pair, settings, backend=backend, after_step=watch))
    return clips


def _after_step(
    on_step: OnStep, mode: Mode, pair: Pair, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
) -> dict[str, Any]:
    on_step(mode, pair, step + 1)
    return tensors


def _without_dense_steps(mode: Mode) -> Mode:
    if mode.config is None:
        return mode
    config, *more = (config.replace(dense_steps=0) for config in (mode.config, *mode.more))
    return replace(mode, config=config, more=tuple(more))


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


class StepClock:
    """A `callback_on_step_end` that notes when every step ended, and calls another one."""

    def __init__(self, device: torch.device, then: Callable[..., dict[str, Any]] | None) -> None:
        self._device = device
        self._then = then
        self._ends: list[float] = []
        self._start = self._now()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._ends.append(self.elapsed())
        return tensors if self._then is None else self._then(pipe, step, timestep, tensors)

    def elapsed(self) -> float:
        """Seconds since the clock was made, all queued work included."""
        return self._now() - self._start

    def steps(self) -> tuple[float, ...]:
        """Seconds of every step so far."""
        return tuple(end - start for start, end in zip([0.0, *self._ends], self._ends, strict=False))

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
