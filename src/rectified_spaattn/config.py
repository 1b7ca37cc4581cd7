"""SparseConfig, the one place where every choice of the method is named, and the presets of models."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .curve import CONTENT, ORDERS

Rectify = Literal["none", "pooled", "ipar", "ipar+gapr", "row"]
RECTIFY_MODES: tuple[str, ...] = get_args(Rectify)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """How attention is made sparse and repaired. Equations: arXiv 2511.19835; docs/method.md names them one by one.

    sparsity       fraction of the tiled blocks that may be dropped, in [0, 1)
    top_p          the kept blocks and the isolated tokens hold at least this attention mass, in [0, 1]
    rectify        "none": plain block-sparse; "pooled": text pooled like video, no log b, every dropped block
                   compensated; "ipar": exact text and log b, every dropped block compensated; "ipar+gapr": compensated
                   only where the gain beats the pooling error (the paper); "row": every dropped block joins the softmax
                   of every query as one pooled key, its mass corrected for how the block's keys spread (the default)
    block_size     tokens a block, a multiple of 16
    order          how video tokens are laid out before they are cut into blocks: in space "gilbert" (the paper),
                   "tile", "raster"; or "content": sorted in every call and head, so that a block holds tokens that
                   attend alike (the default)
    neighbours     blocks that touch in 3-D always see each other (the paper); only with an order in space
    first_frame    blocks that hold tokens of frame 0 always see each other; only with an order in space
    dense_steps    full attention in the first denoising steps: a count, or a fraction of all steps below 1
    dense_layers   indices of the layers that keep full attention

    `block_size` and `order` are read where a TokenLayout is built, the schedule by `enable`; the operator itself takes
    both from the layout it is given.

    Raises TypeError for a wrong type or an unknown key, ValueError for a value out of range.
    """

    sparsity: float = 0.8
    top_p: float = 0.3
    rectify: Rectify = "row"
    block_size: int = 128
    order: str = CONTENT
    neighbours: bool = False
    first_frame: bool = False
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_number("sparsity", self.sparsity, 0.0, 1.0, high_open=True)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        check_choice("rectify", self.rectify, RECTIFY_MODES)
        check_choice("order", self.order, tuple(ORDERS))
        check_block_size(self.block_size)
        for name in ("neighbours", "first_frame"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; allowed: True or False.")
        check_has_places(self.order, self.neighbours, self.first_frame)
        self._check_dense_steps()
        if isinstance(self.dense_layers, str | bytes) or not hasattr(self.dense_layers, "__iter__"):
            raise TypeError(f"dense_layers: got {self.dense_layers!r}; allowed: layer indices, such as (0, 1).")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for layer in self.dense_layers:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"dense_layers: got {layer!r}; allowed: integers, such as (0, 1).")
            if layer < 0:
                raise ValueError(f"dense_layers: got {layer}; allowed: 0 or more, counted from the first layer.")

    def _check_dense_steps(self) -> None:
        steps = self.dense_steps
        if isinstance(steps, bool) or not isinstance(steps, int | float):
            raise TypeError(f"dense_steps: got {steps!r}; allowed: a count (5) or a fraction below 1 (0.1).")
        if math.isnan(steps) or steps < 0 or (isinstance(steps, float) and steps >= 1):
            raise ValueError(
                f"dense_steps: got {steps!r}; allowed: an integer count of 0 or more, or a float fraction in [0, 1). "
                "For a count, pass an int."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseConfig":
        """A config from plain values. Raises TypeError for keys it does not know."""
        return cls()._replace(values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SparseConfig":
        """A config from a YAML file that holds one mapping. Needs pyyaml."""
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise TypeError(f"{path}: got {type(values).__name__}; allowed: one mapping, such as 'sparsity: 0.8'.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that from_dict(to_dict()) is the same config."""
        return {**dataclasses.asdict(self), "dense_layers": list(self.dense_layers)}

    def replace(self, **overrides: Any) -> "SparseConfig":
        """The same config with some fields changed. Raises TypeError for keys it does not know."""
        return self._replace(overrides)

    def _replace(self, values: Mapping[str, Any]) -> "SparseConfig":
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(values) - set(known), key=repr)
        if unknown:
            raise TypeError(f"SparseConfig: got unknown key(s) {unknown}; allowed: {known}. Check the spelling.")
        return dataclasses.replace(self, **values)

    def dense_step_count(self, total_steps: int | None) -> int:
        """How many leading steps run full attention; a fraction is rounded to the nearest step (half up)."""
        if isinstance(self.dense_steps, int):
            return self.dense_steps
        if self.dense_steps == 0:
            return 0
        if total_steps is None:
            raise RuntimeError(
                f"dense_steps={self.dense_steps} is a fraction, but the number of denoising steps is unknown. "
                "Enable on the whole pipeline, tell it with handle.set_step(step, total), or give a count."
            )
        return math.floor(self.dense_steps * total_steps + 0.5)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, as plain values. Raises ValueError for a file that is no YAML. Needs pyyaml."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got a file that is no YAML; allowed: such as 'sparsity: 0.8'. {error}") from error


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError, naming the option, unless value is one of the words allowed."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}; allowed: one of {list(allowed)}.")
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: one of {list(allowed)}.")


def check_has_places(order: str, neighbours: bool, first_frame: bool) -> None:
    """Raises ValueError where blocks have no place in the video, but something asks for it."""
    for name, asked in (("neighbours", neighbours), ("first_frame", first_frame)):
        if order == CONTENT and asked:
            raise ValueError(
                f"{name}: got {asked!r} with order={CONTENT!r}; allowed: False, as blocks that are sorted by content "
                f"lie nowhere in the video. Pass {name}=False, or an order in space."
            )


def check_block_size(block_size: int) -> None:
    """Raises TypeError or ValueError unless block_size is a positive multiple of 16."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size: got {block_size!r}; allowed: an integer multiple of 16, such as 64 or 128.")
    if block_size <= 0 or block_size % 16:
        raise ValueError(f"block_size: got {block_size}; allowed: a positive multiple of 16, such as 64 or 128.")


def _check_number(name: str, value: float, low: float, high: float, high_open: bool = False) -> None:
    allowed = f"a number in [{low:g}, {high:g}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}; allowed: {allowed}.")
    if not (low <= value <= high) or (high_open and value == high):  # NaN fails the first comparison
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}.")


_PAPER = SparseConfig(rectify="ipar+gapr", order="gilbert", neighbours=True)
_WAN = _PAPER.replace(sparsity=0.75, dense_layers=(0, 1), first_frame=True)
_WAN_A14B = _WAN.replace(sparsity=0.85)

# One config a transformer, in the order of the pipeline (Wan2.2 A14B has two). Warm-ups are kept as fractions of the
# published number of steps (5 of 50; 3 and 1 of 40), so that samplers with fewer steps keep their sparse share.
_PUBLISHED: dict[str, tuple[SparseConfig, ...]] = {
    "hunyuan-video-t2v": (_PAPER.replace(sparsity=0.80),),
    "wan2.1-t2v": (_WAN.replace(dense_steps=0.1),),
    "wan2.1-i2v": (_WAN,),
    "wan2.2-t2v-a14b": (_WAN_A14B.replace(dense_steps=0.075), _WAN_A14B.replace(dense_steps=0.025)),
    "wan2.2-i2v-a14b": (_WAN_A14B, _WAN_A14B),
    "wan2.2-ti2v-5b": (_WAN.replace(dense_steps=0.1),),
    "cogvideox1.5-t2v": (_PAPER.replace(sparsity=0.85, dense_steps=0.1),),
    "cogvideox1.5-i2v": (_PAPER.replace(sparsity=0.75, dense_steps=0.1),),
    "flux.1-dev-4096": (_PAPER.replace(sparsity=0.90),),
}
_OURS = {name: getattr(SparseConfig(), name) for name in ("rectify", "order", "neighbours", "first_frame")}

# Under the name of a model its published sparsity and schedule with the defaults of this package; under NAME-paper all
# as published.
PRESETS: dict[str, tuple[SparseConfig, ...]] = {
    **{name: tuple(each.replace(**_OURS) for each in published) for name, published in _PUBLISHED.items()},
    **{f"{name}-paper": published for name, published in _PUBLISHED.items()},
}
PRESET_NAMES = f"{', '.join(_PUBLISHED)}; each also with -paper behind it"  # for people


def preset(name: str) -> tuple[SparseConfig, ...]:
    """The settings under `name`, one config a transformer. Raises ValueError for a name it does not know."""
    if name not in PRESETS:
        raise ValueError(
            f"preset: got {name!r}; allowed: one of {list(_PUBLISHED)}, or one of them with '-paper' behind it for all "
            "as published."
        )
    return PRESETS[name]
