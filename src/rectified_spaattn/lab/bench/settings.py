"""What `bench op`, `bench model`, `doctor` and `advise` are asked for. Read without torch, so that help is quick."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ...config import BACKEND_NAMES, Precision, SparseConfig
from ...presets import preset
from ..machine import DEVICES, check_device, device_of
from ..option import ConfigOptions, check_options, given, option
from .architecture import Model
from .baselines import BASELINES
from .models import MODELS, SIZES
from .shapes import DTYPES, MODEL_SHAPES, PEER_NAMES, SELF_CHECK, SHAPES, BenchError, Case, Shape

if TYPE_CHECKING:
    from .rows import Schedule

FEWEST_REPEATS = 2  # for quartiles
PRECISIONS = tuple(name for name in get_args(Precision) if name != "auto")
TIMED_BACKENDS = tuple(name for name in BACKEND_NAMES if name != "reference")  # the oracle is not timed


@dataclass(frozen=True, kw_only=True)
class BenchSettings(ConfigOptions):
    """One run. Raises ValueError or TypeError for values out of range.

    baseline  empty for those that are timed unasked; one that is named and cannot run is an error
    repeats   rounds that count
    """

    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", ())
    baseline: tuple[str, ...] = option(
        "Dense attention to compare with; may be repeated.", (), choices=tuple(BASELINES)
    )
    dtype: str = option("Of the inputs.", "bfloat16", choices=tuple(DTYPES))
    repeats: int = option("Rounds that count; every round runs every call once.", 10, least=FEWEST_REPEATS)
    device: str = option("Where to run.", "auto", choices=DEVICES)
    csv_dir: Path | None = option("Folder for the rows as CSV files.", None)

    def __post_init__(self) -> None:
        check_options(self)
        check_device(self.device)
        for name, values in vars(self).items():
            if isinstance(values, tuple) and len(set(values)) != len(values):
                raise ValueError(f"{name}: got {list(values)}; allowed: values that differ.")
        for sparsity in self.sparsity:
            self.config(sparsity=sparsity)
        self.config()

    def config(self, **more: Any) -> SparseConfig:
        """The settings without a schedule, and with exactly the nominal share of blocks: attention to random numbers is
        flat, and top-p would keep most of them.
        """
        nominal = {"top_p": 0.0, "neighbours": False, "first_frame": False, "dense_steps": 0, "dense_layers": ()}
        return super().config(**nominal, **more)

    def case(self, shape: Shape) -> Case:
        import torch

        return Case(shape, self.config(), getattr(torch, self.dtype), device_of(self.device))

    def check_blocks(self, shape: Shape, name: str) -> None:
        """Raises ValueError for a block size of which the shape has no two blocks."""
        size = self.config().block_size
        if shape.video // size < 2:
            raise ValueError(f"block_size: got {size}; allowed for {name}: one that gives two blocks.")


@dataclass(frozen=True, kw_only=True)
class OpSettings(BenchSettings):
    """One run. Raises ValueError or TypeError for values out of range.

    baseline, backend: empty for every one that can run; one that is named and cannot is an error. peer: empty for none.
    precision: each on the backends that have it; one that none of them has is an error.
    """

    shape: tuple[str, ...] = option("May be repeated.", (), choices=tuple(SHAPES), unset="hunyuan-video")
    all_shapes: bool = option("The shapes of all models.", False)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.5, 0.7, 0.8, 0.8895, 0.95))
    kv_heads: int | None = option("Heads of keys and values, which those of queries share.", None, unset="all")
    backend: tuple[str, ...] = option("May be repeated.", (), choices=TIMED_BACKENDS, unset="all that can run")
    precision: tuple[str, ...] = option(
        "Of the products with kept blocks; may be repeated.", ("inputs",), choices=PRECISIONS
    )
    peer: tuple[str, ...] = option("Others' kernels that are installed; may be repeated.", (), choices=PEER_NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.all_shapes and self.shape:
            raise ValueError("--all-shapes: got --shape, too; allowed: one of the two.")
        for name in self.shapes:
            self.check_blocks(SHAPES[name].small(), name)
            heads = SHAPES[name].heads
            if self.kv_heads is not None and (self.kv_heads < 1 or heads % self.kv_heads):
                raise ValueError(f"kv_heads: got {self.kv_heads}; allowed for {name}: what divides its {heads} heads.")

    @property
    def shapes(self) -> tuple[str, ...]:
        return MODEL_SHAPES if self.all_shapes else self.shape or ("hunyuan-video",)

    def cases(self) -> list[Case]:
        shapes = [SHAPES[name] for name in self.shapes]
        if self.kv_heads is not None:
            named = f" with {self.kv_heads} heads of keys"
            shapes = [replace(shape, name=shape.name + named, kv_heads=self.kv_heads) for shape in shapes]
        return [self.case(shape) for shape in shapes]


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BenchSettings):
    """One run. Raises ValueError or TypeError for values out of range.

    computed_steps  of `steps`; computed_steps_source: who says that a cache skips the others
    """

    model: tuple[str, ...] = option("Timed one after the other.", choices=tuple(MODELS), flag="ARGUMENT")
    size: str = option("Tiny: the same layers, narrow and few, for a CPU.", "full", choices=tuple(SIZES))
    sparsity: tuple[float, ...] = option(
        "Share of blocks to drop; may be repeated.", (), unset="the preset's, the paper's and 0.8895"
    )
    baseline: tuple[str, ...] = option(
        "May be repeated.", (), choices=tuple(BASELINES), unset="cudnn, fa4 where installed; sdpa on a CPU"
    )
    backend: str = option("Backend of sparse attention, or auto.", "auto")
    repeats: int = option("Rounds that count, after one that warms up.", 3, least=FEWEST_REPEATS)
    full: bool = option("Also run all layers once: eager dense, and the sparsest, compiled where it is.", False)
    compile: bool = option("Also time compile_repeated_blocks(fullgraph=True).", True, flag="--compile/--no-compile")
    compiler: str = option("Backend of torch.compile.", "inductor")
    steps: int | None = option("Denoising steps of a run.", None, unset="the model's, 50")
    computed_steps: int | None = option("Steps that a cache such as TeaCache leaves to compute.", None, unset="all")
    computed_steps_source: str = option("Where that number comes from: a measurement or a publication.", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.computed_steps is None) != (self.computed_steps_source == ""):
            raise ValueError(
                f"computed steps: got {self.computed_steps} from {self.computed_steps_source!r}; allowed: both or "
                "neither. Name the measurement or publication the number comes from."
            )
        if self.computed_steps is not None and len(self.model) > 1:
            raise ValueError(f"computed steps: got {len(self.model)} models; allowed: one, as caches differ.")
        for name in self.model:
            model = self.sized(name)
            self.schedule_of(model)
            self.check_blocks(model.shape, name)

    def sized(self, name: str) -> Model:
        return SIZES[self.size](MODELS[name])

    def schedule_of(self, model: Model) -> "Schedule":
        """The preset's. Raises ValueError for step counts that do not fit it."""
        from .rows import Schedule

        published = preset(self.preset or model.preset)[0]
        steps = model.steps if self.steps is None else self.steps
        computed = steps if self.computed_steps is None else self.computed_steps
        dense = published.dense_step_count(steps)
        layers, name = len(published.dense_layers), self.preset or model.preset
        return Schedule(steps, computed, dense, model.calls, layers, name, self.computed_steps_source)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(ConfigOptions):
    """One diagnosis. Raises ValueError or TypeError for values out of range."""

    sparsity: float | None = option("Share of blocks to drop.", None, unset="the preset's; 0.8")
    device: str = option("Where to run.", "auto", choices=DEVICES)
    json: bool = option("Print JSON alone.", False)

    def __post_init__(self) -> None:
        check_device(self.device)
        video, block_size = SELF_CHECK.video, self.config().block_size
        if video // block_size < 2:
            raise ValueError(f"block_size: got {block_size}; allowed: {video // 2 // 16 * 16} or less here.")

    def config(self, **more: Any) -> SparseConfig:
        return super().config(**given(self, "sparsity"), **more)


@dataclass(frozen=True, kw_only=True)
class AdviseSettings(ConfigOptions):
    """A model and a size. Raises ValueError or TypeError for values out of range."""

    model: str = option(
        f"{', '.join(MODELS)}, demo, or the folder or repository of a diffusers pipeline.", flag="ARGUMENT"
    )
    height: int | None = option("Pixels.", None, unset="as the model was published")
    width: int | None = option("Pixels.", None, unset="as the model was published")
    frames: int | None = option("Frames of a video.", None, least=1, unset="as the model was published")
    sparsity: float | None = option("Share of blocks to drop.", None, unset="the preset's")
    device: str = option("Where to measure: a GPU alone.", "auto", choices=DEVICES)

    def __post_init__(self) -> None:
        check_device(self.device)
        check_options(self)
        self.config(**self.overrides())

    def overrides(self) -> dict[str, Any]:
        """What changes the preset."""
        return given(self, "sparsity", "rectify", "order", "block_size")


def runnable(
    what: str, asked: Sequence[str], reasons: Mapping[str, str | None], shape: str, unasked: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Which of the names asked for can run, and the reasons why the others cannot.

    reasons: name -> why it cannot run here, None where it can; unasked: in place of none asked for, empty for all.
    Raises BenchError where one asked for, or all, cannot.
    """
    able = [name for name, reason in reasons.items() if reason is None]
    chosen = asked or unasked or tuple(reasons)
    unable = {name: reason for name in chosen if (reason := reasons[name]) is not None}
    if unable and (asked or len(unable) == len(chosen)):
        listed = "; ".join(f"{name}: {reason}" for name, reason in unable.items())
        raise BenchError(f"{what} {listed}; allowed for {shape} here: {able}.")
    return [name for name in chosen if name in able], unable
