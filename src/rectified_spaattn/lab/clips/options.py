"""What `rectified-spaattn generate` is asked for, and the command that asks for it again."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..backends import BACKENDS
from ..config import SparseConfig, check_choice
from ..config import preset as preset_of

DTYPES = ("auto", "bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "group")
_OWN_ARGUMENTS = {
    "prompt": "the option --prompt",
    "negative_prompt": "the option --negative-prompt",
    "image": "the option --image",
    "height": "the option --height",
    "width": "the option --width",
    "num_frames": "the option --frames",
    "num_inference_steps": "the option --steps",
    "guidance_scale": "the option --guidance",
    "generator": "the option --seed",
    "output_type": "nothing: the command needs tensors",
    "return_dict": "nothing: the command needs the output by name",
    "callback_on_step_end": "nothing: the command watches the steps",
    "num_videos_per_prompt": "nothing: one a run",
    "num_images_per_prompt": "nothing: one a run",
}


class GenerationError(RuntimeError):
    """Something asked for cannot be had here. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run. Fields carry the names of the options; None leaves the choice to the model or the pipeline.

    model       repository or local folder
    config      YAML files, one for all transformers or one each; sparsity overrides theirs and the preset's
    argument    further arguments of the pipeline's call, KEY=VALUE with a YAML value
    scheduler   changes to the scheduler's configuration, KEY=VALUE with a YAML value

    Raises TypeError or ValueError for what is wrong whatever the model is.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    image: str | None = None
    out: Path | None = None
    revision: str | None = None
    sparsity: float | None = None
    preset: str | None = None
    config: tuple[Path, ...] = ()
    teacache: bool = False
    teacache_threshold: float | None = None
    compile: bool = False
    compare: bool = False
    steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    argument: tuple[str, ...] = ()
    scheduler: tuple[str, ...] = ()
    fps: int = 16
    dtype: str = "auto"
    offload: str = "none"
    backend: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "frames", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; allowed: 1 or more.")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("offload", self.offload, OFFLOADS)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        if self.preset is not None:
            preset_of(self.preset)
            if self.config:
                raise ValueError("config: got --preset, too; allowed: one of the two.")
        if self.teacache_threshold is not None and not self.teacache:
            raise ValueError("teacache_threshold: got a value without --teacache; allowed: both, or neither.")
        self.configs()
        self.arguments()
        self.scheduler_changes()

    def configs(self) -> tuple[SparseConfig, ...] | None:
        """The configs of the files, None without files. Raises as SparseConfig.from_yaml does."""
        for path in self.config:
            if not path.is_file():
                raise ValueError(f"config: got {path}; allowed: a YAML file, and there is none at that path.")
        read = tuple(SparseConfig.from_yaml(path).replace(**self.overrides()) for path in self.config)
        SparseConfig().replace(**self.overrides())
        return read or None

    def overrides(self) -> dict[str, Any]:
        """What changes the preset."""
        return {} if self.sparsity is None else {"sparsity": self.sparsity}

    def arguments(self) -> dict[str, Any]:
        """What --argument says."""
        parsed = _pairs("argument", self.argument)
        for name in parsed:
            if name in _OWN_ARGUMENTS:
                raise ValueError(f"argument: got {name}; allowed: what has no option. Use {_OWN_ARGUMENTS[name]}.")
        return parsed

    def scheduler_changes(self) -> dict[str, Any]:
        """What --scheduler says."""
        return _pairs("scheduler", self.scheduler)

    def command(self, **changes: Any) -> list[str]:
        """The words that ask for the same again, `changes` apart: what was left out stays out."""
        words = ["rectified-spaattn", "generate", self.model]
        for field in fields(self)[1:]:
            value = changes.get(field.name, getattr(self, field.name))
            option = "--" + field.name.replace("_", "-")
            if value is True:
                words.append(option)
            elif value is not None and value is not False:
                for each in value if isinstance(value, tuple) else (value,):
                    words += [option, str(each)]
        return words

    def command_line(self, **changes: Any) -> str:
        """`command` as a shell reads it."""
        return shlex.join(self.command(**changes))


def _pairs(name: str, texts: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    parsed = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{name}: got {text!r}; allowed: KEY=VALUE, such as max_sequence_length=256.")
        if key in parsed:
            raise ValueError(f"{name}: got {key} twice; allowed: once.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: got {text!r}; allowed: a YAML value behind the '='. {error}") from error
    return parsed
