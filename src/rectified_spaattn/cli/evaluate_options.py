"""What `rectified-spaattn evaluate` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import check_choice
from ..generation.request import DTYPES, OFFLOADS, Request

if TYPE_CHECKING:
    from ..evaluation.modes import Grid


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """One evaluation, named as the command's options; None leaves a choice to the model.

    Raises ValueError for values out of range and files that are not there.
    """

    out: Path
    model: str = "demo"
    prompts: Path | None = None
    seeds: int = 1
    configs: tuple[Path, ...] = ()
    grid: "Grid"
    negative_prompt: str | None = None
    argument: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fps: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    backend: str = "auto"
    dense_kernel: str = "default"
    floor_kernel: str | None = None
    lpips: bool | None = None
    command: str = "rectified-spaattn evaluate"

    def __post_init__(self) -> None:
        for name in ("seeds", "height", "width", "frames", "steps", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; allowed: 1 or more.")
        for name, allowed in (("dtype", DTYPES), ("offload", OFFLOADS)):
            check_choice(name, getattr(self, name), allowed)
        for path in (self.prompts, *self.configs):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: got no such file; allowed: a file that can be read.")
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        given = Request(model=self.model, prompt="", argument=self.argument).arguments()
        return given if self.negative_prompt is None else {"negative_prompt": self.negative_prompt, **given}
