"""What is chosen on the page, as configurations, and as the lines of Python that do the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import SparseConfig, check_choice
from ..demo_model.words import MOTIONS, PAIRED, Solid, caption, places
from ..option import given
from ..pages.styles import STYLES

PLAIN, PAPER, OURS = (STYLES[name].label for name in ("none", "ipar+gapr", "query+slope"))
MODES = (OURS, PAPER)  # what can stand in the third column
NOTHING = "nothing"
_PAPER = SparseConfig.paper()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One comparison. Of sparsity and tolerance one is None; only ours holds a tolerance.

    Raises ValueError for another mode, or for both or neither.
    """

    prompt: str
    seed: int = 0
    mode: str = OURS
    sparsity: float | None = 0.8
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        if not self.prompt.strip():
            raise ValueError("prompt: got none; allowed: some words.")
        if (self.sparsity is None) == (self.tolerance is None):
            raise ValueError("sparsity: got a tolerance, too, or neither; allowed: one of the two.")
        if self.tolerance is not None and self.mode != OURS:
            raise ValueError(f"tolerance: got {self.tolerance} with {self.mode!r}; allowed: with 'ours' alone.")

    @property
    def overrides(self) -> dict[str, Any]:
        """What changes a preset."""
        return given(self, "sparsity", "tolerance")


def scene(
    solid: Solid, motion: str, floor: str, camera: str = NOTHING, other: Solid | None = None, sunset: bool = False
) -> str:
    """The caption of what the dropdowns say. Raises ValueError where the motion needs a second object."""
    check_choice("motion", motion, tuple(MOTIONS))
    if motion in PAIRED and other is None:
        raise ValueError(f"motion: got {motion!r} with one object; allowed: with a second one. Choose its colour.")
    solids = (solid,) if other is None else (solid, other)
    place = places(motion)[0] if other is not None and motion not in PAIRED else None
    return caption(solids, motion, place, floor, None if camera == NOTHING else camera, sunset)


def configs_of(choice: Choice, base: Sequence[SparseConfig]) -> tuple[SparseConfig, ...]:
    """Of the third column. base: what `enable` starts from, one for all transformers or one each."""
    paper = {"rectify": _PAPER.rectify, "order": _PAPER.order} if choice.mode == PAPER else {}
    return tuple(each.replace(**choice.overrides, **paper) for each in base)


def plain_configs(sparsity: float, base: Sequence[SparseConfig]) -> tuple[SparseConfig, ...]:
    """Of plain block-sparse attention, on the paper's blocks."""
    return tuple(each.replace(sparsity=sparsity, rectify="none", order=_PAPER.order) for each in base)


def same_pairs(choice: Choice, computed: float) -> float:
    """The sparsity of plain sparse beside it: the same, or under a tolerance what leaves as many pairs as it computed.

    computed: share of all pairs. In [0.05, 0.99], in whole hundredths, so that few clips differ.
    """
    return choice.sparsity if choice.sparsity is not None else min(0.99, max(0.05, round(1 - computed, 2)))


def python_lines(choice: Choice, base: Sequence[SparseConfig], is_preset: bool) -> str:
    """Three lines that do the same to a pipeline. is_preset: `enable` finds base by itself; else it is written out."""
    own = {} if is_preset else _differences(base[0])
    paper = {"rectify": _PAPER.rectify, "order": _PAPER.order} if choice.mode == PAPER else {}
    words = ", ".join(f"{name}={value!r}" for name, value in {**choice.overrides, **own, **paper}.items())
    return f"import rectified_spaattn as rsa\nhandle = rsa.enable(pipe, {words})\nprint(handle.summary())"


def _differences(config: SparseConfig) -> dict[str, Any]:
    """Fields that are not as `enable` has them where nothing is said."""
    usual = SparseConfig().to_dict() | {"sparsity": config.sparsity, "tolerance": config.tolerance}
    return {name: value for name, value in config.to_dict().items() if value != usual[name]}
