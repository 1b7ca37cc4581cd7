"""What the commands about clips are asked for."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...config import BACKEND_NAMES, ORDERS, RECTIFY, SparseConfig, parse_yaml
from ...presets import PRESET_NAMES
from ...presets import preset as preset_of
from ..machine import DEVICES, check_device
from ..option import check_options, given, option

DTYPES = ("auto", "bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "group")
# What runs scaled_dot_product_attention, for dense attention and for the blocks that the torch backend gathers: by its
# name in torch.nn.attention.SDPBackend, as options are read without torch.
KERNELS = {
    "default": None,  # PyTorch's own choice
    "math": "MATH",
    "efficient": "EFFICIENT_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
FLOOR_KERNELS = tuple(KERNELS)[1:]
DEMO = "demo"
SMALL_GRID: dict[str, Any] = {"block_size": 64, "top_p": 0.0}  # what fits the demo model: exact sparsity
CALL = {  # field -> argument of the pipeline's call
    **{name: name for name in ("prompt", "negative_prompt", "image", "last_image", "height", "width")},
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
PICTURES = ("image", "last_image")  # of those, what is read from a file or an address
_TAKEN = {argument: f"the option --{name.replace('_', '-')}" for name, argument in CALL.items()} | {
    "generator": "the option --seed",
    "output_type": "nothing: the command needs tensors",
    "return_dict": "nothing: the command needs the output by name",
    "callback_on_step_end": "nothing: the command watches the steps",
    "num_videos_per_prompt": "nothing: one a run",
    "num_images_per_prompt": "nothing: one a run",
}
_THE_PIPELINES: dict[str, Any] = {"least": 1, "unset": "the pipeline's"}


class ClipError(RuntimeError):
    """Something asked for cannot be had here. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model and how its pipeline is called; None leaves the choice to the pipeline.

    argument, scheduler   KEY=VALUE with a YAML value. Raises TypeError or ValueError for what is wrong whatever the
    model is.
    """

    model: str = option("demo, or the folder or repository of a diffusers pipeline.", DEMO)
    revision: str | None = option("Branch, tag or commit of the repository.", None)
    negative_prompt: str | None = option("What not to show.", None)
    image: str | None = option("File or address of the picture to start from.", None)
    last_image: str | None = option("The same of the picture to end with.", None)
    height: int | None = option("Pixels.", None, **_THE_PIPELINES)
    width: int | None = option("Pixels.", None, **_THE_PIPELINES)
    frames: int | None = option("Frames of a video.", None, **_THE_PIPELINES)
    steps: int | None = option("Denoising steps.", None, **_THE_PIPELINES)
    guidance: float | None = option("guidance_scale.", None, unset="the pipeline's")
    argument: tuple[str, ...] = option("KEY=VALUE for the pipeline's call, the value in YAML; may be repeated.", ())
    scheduler: tuple[str, ...] = option(
        "KEY=VALUE for the scheduler's configuration, such as flow_shift=5.0; class=NAME for another one; may be "
        "repeated.",
        (),
    )
    dtype: str = option("auto: bfloat16 on a GPU; float32 on a CPU and for demo.", "auto", choices=DTYPES)
    offload: str = option("What stays on the CPU until it is needed.", "none", choices=OFFLOADS)
    backend: str = option("Attention backend.", "auto", choices=("auto", *BACKEND_NAMES))
    device: str = option("Where to run.", "auto", choices=DEVICES)

    def __post_init__(self) -> None:
        seed = getattr(self, "seed", 0)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: got {seed}; allowed: what PyTorch takes, -2**63 to 2**64 - 1.")
        check_device(self.device)
        check_options(self)
        self.arguments()
        self.scheduler_changes()

    @property
    def pictures(self) -> frozenset[str]:
        """Arguments of the pipeline's call that are pictures."""
        return frozenset(name for name in PICTURES if getattr(self, name) is not None)

    def arguments(self) -> dict[str, Any]:
        """What --argument says."""
        parsed = _pairs("argument", self.argument)
        for name in parsed:
            if name in _TAKEN:
                raise ValueError(f"argument: got {name}; allowed: what has no option. Use {_TAKEN[name]}.")
        return parsed

    def scheduler_changes(self) -> dict[str, Any]:
        """What --scheduler says."""
        return _pairs("scheduler", self.scheduler)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """One video or picture, or one a prompt of a file.

    config    YAML files, one for all transformers or one each; sparsity and tolerance override theirs and the preset's
    """

    model: str = option("Folder or repository of a diffusers pipeline.", flag="ARGUMENT")
    prompt: str | None = option("What to show.", None)
    prompts: Path | None = option("Text file instead, one prompt a line: one clip of each, and --out a folder.", None)
    out: Path | None = option("File to write, .mp4 or .png.", None, unset="generated.mp4 or .png")
    overwrite: bool = option("Replace files that are there.", False)
    sparsity: float | None = option("Share of blocks to drop.", None, unset="the preset's")
    tolerance: float | None = option("Error of a call to hold, in place of a sparsity.", None, unset="none")
    preset: str | None = option(f"{PRESET_NAMES}.", None, unset="the one that fits the model")
    config: tuple[Path, ...] = option(
        "YAML file with fields of SparseConfig, instead of a preset; may be repeated, one each.", ()
    )
    teacache: bool = option("Skip steps that change little, too.", False)
    teacache_threshold: float | None = option("Change up to which steps are skipped.", None, unset="the model's")
    compile: bool = option("Compile the transformer's blocks.", False)
    compare: bool = option("Run full attention from the same seed as well, and write both.", False)
    seed: int = option("Seed of the noise.", 0)
    fps: int = option("Frames a second in the file.", 16, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("prompt: got --prompt and --prompts, or neither; allowed: one of the two.")
        if self.prompts is not None and self.out is None:
            raise ValueError("out: got none with --prompts; allowed: a folder for the clips. Give --out FOLDER.")
        if self.preset is not None:
            preset_of(self.preset)
            if self.config:
                raise ValueError("config: got --preset, too; allowed: one of the two.")
        if self.teacache_threshold is not None and not self.teacache:
            raise ValueError("teacache_threshold: got a value without --teacache; allowed: both, or neither.")
        self.configs()

    def configs(self) -> tuple[SparseConfig, ...] | None:
        """The configs of the files, None without files. Raises as SparseConfig.from_yaml does."""
        _check_files(self.config)
        overrides = self.overrides()
        SparseConfig().replace(**overrides)
        return tuple(SparseConfig.from_yaml(path).replace(**overrides) for path in self.config) or None

    def overrides(self) -> dict[str, Any]:
        """What changes the preset."""
        return given(self, "sparsity", "tolerance")

    def command_line(self, **changes: Any) -> str:
        """The command that asks for the same again, `changes` apart: what was left out stays out."""
        words = ["rectified-spaattn", "generate", self.model]
        for field in fields(self):
            value = changes.get(field.name, getattr(self, field.name))
            if field.name in ("model", "overwrite") or value == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            for each in value if isinstance(value, tuple) else (value,):
                words += [flag] if each is True else [flag, str(each)]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Clips of full attention and of a list of configurations."""

    out: Path = option("Folder for everything; one of a run that was stopped is gone on with.")
    prompts: Path | None = option(
        "Text file, one prompt a line; or .csv with columns prompt and image, last_image or both.",
        None,
        unset="the demo's captions",
    )
    seeds: int = option("Clips a prompt, from seeds 0, 1, ...", 1, least=1)
    config: tuple[Path, ...] = option("YAML file with fields of SparseConfig; may be repeated.", ())
    preset: tuple[str, ...] = option("Settings by name, as `generate --preset` has them; may be repeated.", ())
    rectify: tuple[str, ...] = option("This and the next four may be repeated.", (), choices=tuple(RECTIFY))
    sparsity: tuple[float, ...] = option("Share of blocks to drop.", ())
    tolerance: tuple[float, ...] = option("Errors of a call to hold, in place of a sparsity.", ())
    block_size: tuple[int, ...] = option("Tokens a block.", ())
    order: tuple[str, ...] = option("How blocks are made.", (), choices=ORDERS)
    top_p: float | None = option("Least attention mass the kept blocks hold.", None)
    neighbours: bool | None = option("Always keep blocks that touch in 3-D; needs an --order other than content.", None)
    fps: int | None = option("Frames a second in the videos.", None, least=1, unset="8 for demo, else 16")
    floor_kernel: str | None = option(
        "SDPA kernel of the noise floor, another one than PyTorch chooses.",
        None,
        choices=FLOOR_KERNELS,
        unset="math for demo and on a CPU, else efficient",
    )
    lpips: bool | None = option("Learned perceptual distance.", None, unset="where its weights are there")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_files((*self.config, *(() if self.prompts is None else (self.prompts,))))
        for name in self.preset:
            preset_of(name)
        if self.sparsity and self.tolerance:
            raise ValueError(
                "tolerance: got --sparsity, too; allowed: one of the two, as blocks follow one of them. A --config "
                "file may hold both: a run with a tolerance starts from its sparsity."
            )
        if self.overrides() and (self.config or self.preset) and not any(self.grid().values()):
            raise ValueError(
                f"{', '.join(self.overrides())}: got a value, but only --config files and presets; allowed: with grid "
                "options such as --sparsity. A file and a preset say everything themselves."
            )

    @property
    def pictures(self) -> frozenset[str]:
        """Also those that a table of prompts has a column for."""
        from .prompts import read_prompts

        rows = {} if self.prompts is None else read_prompts(self.prompts)
        return super().pictures | {name for pictures in rows.values() for name in pictures}

    def grid(self) -> dict[str, tuple[Any, ...]]:
        """The values to combine; an empty one keeps the model's own."""
        names = ("sparsity", "tolerance", "rectify", "block_size", "order")
        return {name: tuple(getattr(self, name)) for name in names}

    def overrides(self) -> dict[str, Any]:
        """Other fields of SparseConfig that all combinations have."""
        return given(self, "top_p", "neighbours")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The demo model's clips: full, plain sparse, paper, ours.

    prompt   captions in place of the fixed prompts; quick: full, plain sparse and ours, one clip each
    """

    out: Path = option("Folder for the report, videos, figures and metrics.json.", Path("demo-output"))
    quick: bool = option("A first look: full, plain sparse and ours, a clip each.", False)
    prompts: int | None = option("How many of the fixed prompts.", None, least=1, unset="3")
    prompt: tuple[str, ...] = option("A caption of your own, in the words the model knows; may be repeated.", ())
    seeds: int = option("Seeds per prompt: 0, 1, ...", 1, least=1)
    steps: int = option("Denoising steps.", 12, least=1)
    size: int = option("Height and width in pixels; the model was trained at 64; 96 is for timing.", 64)
    sparsity: tuple[float, ...] = option("Share of blocks to drop; may be repeated.", (0.9,))
    block_size: int = option("Tokens a block.", SMALL_GRID["block_size"])
    device: str = option("Where to run.", "auto", choices=DEVICES)
    backend: str = option("Attention backend.", "auto", choices=("auto", *BACKEND_NAMES))
    weights: Path | None = option("Folder with weights of your own training.", None)

    def __post_init__(self) -> None:
        check_device(self.device)
        check_options(self)
        if self.size < 16 or self.size % 4:
            raise ValueError(f"size: got {self.size}; allowed: a multiple of 4 from 16 on, best 64.")
        if not self.sparsity or len({f"{100 * each:g}" for each in self.sparsity}) != len(self.sparsity):
            raise ValueError(f"sparsity: got {self.sparsity}; allowed: one or more values that differ.")
        for sparsity in self.sparsity:
            self.paper(sparsity)

    def paper(self, sparsity: float) -> SparseConfig:
        """The paper's settings on this small grid."""
        exact = SMALL_GRID | {"block_size": self.block_size}
        return SparseConfig.paper(sparsity=sparsity, neighbours=False, **exact)  # neighbours alone are many here

    def plain(self, sparsity: float) -> SparseConfig:
        """The paper's blocks, with nothing in the place of those that are dropped."""
        return self.paper(sparsity).replace(rectify="none")

    def ours(self, sparsity: float) -> SparseConfig:
        """The package's default."""
        return SparseConfig(sparsity=sparsity, **(SMALL_GRID | {"block_size": self.block_size}))


def _check_files(paths: tuple[Path, ...]) -> None:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: got no such file; allowed: a file that can be read.")


def _pairs(name: str, texts: tuple[str, ...]) -> dict[str, Any]:
    parsed = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{name}: got {text!r}; allowed: KEY=VALUE, such as max_sequence_length=256.")
        if key in parsed:
            raise ValueError(f"{name}: got {key} twice; allowed: once.")
        try:
            parsed[key] = parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"{name}: got {text!r}; allowed: a YAML value behind the '='. {error}") from error
    return parsed
