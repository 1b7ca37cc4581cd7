"""SparseConfig, the one place where every choice of the method is named, and what each rectify mode means."""

import ast
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Rectify = Literal["none", "pooled", "ipar", "ipar+gapr", "row", "row+slope", "query+slope"]
Order = Literal["content", "gilbert", "tile", "raster"]
ORDERS: tuple[str, ...] = get_args(Order)
Precision = Literal["inputs", "int8-qk", "fp8", "auto"]
BACKEND_NAMES = ("fa4", "triton", "torch", "reference")  # their rows are in backends/
PROBES = 64  # query rows a head that measure the error where there is a tolerance
_OPERATOR = ("sparsity", "top_p", "rectify", "block_size", "order", "neighbours", "first_frame", "precision")


class Rule(NamedTuple):
    """What a rectify mode means, read by every stage and kernel.

    pooled_text  the estimate pools isolated tokens like video; otherwise each of them stands for itself
    log_b        a pooled column of the estimate counts the tokens that it stands for
    gate         which dropped blocks are compensated: "none", "all", or "gain", where the gain beats the pooling error
    tail         a compensated block joins the softmax of every query as one pooled key; otherwise R and C compensate
    slope        how values change with keys is added to the tail, to first order and one matrix a head
    choice       kept are, in every row, the blocks of most "mass", or, in the whole head, those that would leave the
                 largest "error" if a pooled key stood for them
    queries      single queries tell that error, and every query how far a pooled key's own keys spread for it;
                 otherwise the mean query of a block tells both

    Only with a tail is there a slope, an error, or anything for single queries to tell.
    """

    pooled_text: bool = False
    log_b: bool = True
    gate: Literal["none", "all", "gain"] = "all"
    tail: bool = False
    slope: bool = False
    choice: Literal["mass", "error"] = "mass"
    queries: bool = False


RECTIFY: dict[str, Rule] = {
    "none": Rule(gate="none"),
    "pooled": Rule(pooled_text=True, log_b=False),
    "ipar": Rule(),
    "ipar+gapr": Rule(gate="gain"),
    "row": Rule(tail=True),
    "row+slope": Rule(tail=True, slope=True, choice="error"),
    "query+slope": Rule(tail=True, slope=True, choice="error", queries=True),
}


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """How attention is made sparse and repaired. Equations: arXiv 2511.19835; docs/method.md names them one by one.

    sparsity          fraction of the tiled blocks that may be dropped, in [0, 1)
    top_p             the kept blocks and the isolated tokens hold at least this attention mass, in [0, 1]; 1 keeps all
    rectify           "none": plain block-sparse; "pooled": text pooled like video, no log b, every dropped block
                      compensated; "ipar": exact text and log b, every dropped block compensated; "ipar+gapr":
                      compensated only where the gain beats the pooling error (the paper); "row": every dropped block
                      joins the softmax of every query as one pooled key, its mass corrected for how the block's keys
                      spread; "row+slope": besides, values follow keys to first order, and blocks are kept by the
                      error that they would leave, as many a head, not a row, as `sparsity` says; "query+slope":
                      besides, single queries tell that error and that spread, not the mean of their block (the default)
    block_size        b, tokens a block, a multiple of 16
    order             how tokens are laid out before they are cut into blocks: in space "gilbert" (the paper), "tile",
                      "raster"; or "content": sorted in every call and head, so that a block holds tokens that attend
                      alike (the default)
    precision         of the products with kept blocks: "inputs": as q, k, v are; "int8-qk": queries times keys in int8;
                      "fp8": these and weights times values in float8. All else stays as it is (triton on NVIDIA GPUs);
                      "auto": 8 bits in calls of a layer where they raise the squared error of its probe rows by a tenth
                      at most, as measured in the run itself on the same blocks; "inputs" in all others
    neighbours        blocks that touch in 3-D always see each other (the paper); only with an order in space
    first_frame       blocks that hold tokens of frame 0 always see each other; only with an order in space
    dense_steps       full attention in the first denoising steps: a count, or a fraction of all steps below 1
    dense_last_steps  full attention in the last denoising steps, likewise
    dense_layers      indices of the layers that keep full attention
    tolerance         in place of a guessed sparsity the output error that heads shall have, |out - full| / |full|, root
                      mean square over those of a step, in (0, 1): how many blocks each keeps follows what probe rows
                      measure, step by step, from what `sparsity` says on; None: as many as `sparsity` says
    max_density       the largest share of a head's blocks that a tolerance keeps, in (0, 1]
    probes            query rows a head that are also computed exactly, to measure the error; None: 64 with a tolerance,
                      else 0, but where precision="auto" looks
    replan            every so many denoising steps a layer sorts its tokens anew, in each guidance call; in between the
                      order of order="content" is kept, and pooled keys and values are taken anew. 1: in every call
    kept_lists        the lists of kept blocks live as long as the order; with any order, and without a tolerance

    The schedule (the dense ones), tolerance, max_density, replan, kept_lists and precision="auto" are read by `enable`,
    all else by the operator.

    Raises TypeError for a wrong type or an unknown key, ValueError for a value out of range.
    """

    sparsity: float = 0.8
    top_p: float = 0.3
    rectify: Rectify = "query+slope"
    block_size: int = 128
    order: Order = "content"
    precision: Precision = "inputs"
    neighbours: bool = False
    first_frame: bool = False
    dense_steps: int | float = 0
    dense_last_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    tolerance: float | None = None
    max_density: float = 0.5
    probes: int | None = None
    replan: int = 1
    kept_lists: bool = False
    key: str = field(init=False, repr=False, compare=False)  # what the operator reads, as its schema carries it

    def __post_init__(self) -> None:
        for name in ("sparsity", "top_p"):
            object.__setattr__(self, name, _fraction(name, getattr(self, name), closed=name == "top_p"))
        check_choice("rectify", self.rectify, tuple(RECTIFY))
        check_choice("order", self.order, ORDERS)
        check_choice("precision", self.precision, get_args(Precision))
        object.__setattr__(self, "block_size", _block_size(self.block_size))
        for name in ("neighbours", "first_frame"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; allowed: True or False.")
            if getattr(self, name) and self.by_content:
                raise ValueError(
                    f"{name}: got True with order='content'; allowed: False, as blocks that are sorted by content lie "
                    f"nowhere in the video. Pass {name}=False, or an order in space."
                )
        for name in ("dense_steps", "dense_last_steps"):
            object.__setattr__(self, name, _steps(name, getattr(self, name)))
        object.__setattr__(self, "dense_layers", _layers(self.dense_layers))
        _check_tolerance(self)
        _check_replan(self)
        object.__setattr__(self, "key", repr([getattr(self, name) for name in _OPERATOR]))

    @classmethod
    def paper(cls, **overrides: Any) -> "SparseConfig":
        """The paper's method: rectification "ipar+gapr" on blocks along a Gilbert curve that see their neighbours."""
        return cls(rectify="ipar+gapr", order="gilbert", neighbours=True)._replace(overrides)

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

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> "SparseConfig":
        """A config with the fields that `key` holds; cached."""
        return SparseConfig(**dict(zip(_OPERATOR, ast.literal_eval(key), strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that from_dict(to_dict()) is the same config."""
        return {name: getattr(self, name) for name in _fields()} | {"dense_layers": list(self.dense_layers)}

    def replace(self, **overrides: Any) -> "SparseConfig":
        """The same config with some fields changed. Raises TypeError for keys it does not know."""
        return self._replace(overrides)

    def _replace(self, values: Mapping[str, Any]) -> "SparseConfig":
        unknown = sorted(set(values) - set(_fields()), key=repr)
        if unknown:
            meant = nearest(str(unknown[0]), _fields()) or " Check the spelling."
            raise TypeError(f"SparseConfig: got unknown key(s) {unknown}; allowed: {_fields()}.{meant}")
        return dataclasses.replace(self, **values)

    @property
    def rule(self) -> Rule:
        return RECTIFY[self.rectify]

    @property
    def by_content(self) -> bool:
        """Whether a call sorts its tokens, head by head; no grid is needed then."""
        return self.order == "content"

    @property
    def probe_rows(self) -> int:
        """How many query rows a head are computed exactly, too, where there are as many."""
        if self.probes is None:
            return 0 if self.tolerance is None else PROBES
        return self.probes

    @property
    def least_precision(self) -> str:
        """What a backend must be able to run: "auto" does without 8 bits."""
        return "inputs" if self.precision == "auto" else self.precision

    @property
    def description(self) -> str:
        """What a summary says beside the sparsity or the tolerance: how blocks are made, kept and repaired."""
        precision = "" if self.precision == "inputs" else f", precision {self.precision}"
        return f"top_p {self.top_p:g}, rectify {self.rectify}, block {self.block_size}, order {self.order}{precision}"

    @property
    def keeps_plans(self) -> bool:
        """Whether a call leaves anything to the steps after it."""
        return self.replan > 1 and (self.by_content or self.kept_lists)

    def dense_step_count(self, total_steps: int | None) -> int:
        """How many leading steps run full attention; a fraction is rounded to the nearest step (half up)."""
        return _count("dense_steps", self.dense_steps, total_steps)

    def dense_last_step_count(self, total_steps: int | None) -> int:
        """How many final steps run full attention; a fraction is rounded to the nearest step (half up)."""
        return _count("dense_last_steps", self.dense_last_steps, total_steps)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, as plain values. Raises ValueError for a file that is no YAML. Needs pyyaml."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: got a file that is no YAML; allowed: such as 'sparsity: 0.8'. {error}") from error


def parse_yaml(text: str) -> Any:
    """What a YAML text holds, as plain values. Raises ValueError for another one. Needs pyyaml."""
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 20:  # few bytes of these can take hours or gigabytes
                raise ValueError("Aliases (*name) and more than 20 levels are not allowed.")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError, naming the option, unless value is one of the words allowed."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}; allowed: one of {list(allowed)}.")
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: one of {list(allowed)}.{nearest(value, allowed)}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error message: " Did you mean ...?" with the most similar of the words; "" where none is."""
    import difflib

    similar = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {similar[0]!r}?" if similar else ""


def _fields() -> list[str]:
    return [each.name for each in dataclasses.fields(SparseConfig) if each.init]


def _fraction(name: str, value: float, closed: bool) -> float:
    allowed = f"a number in [0, 1{']' if closed else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; allowed: {allowed}.")
    if not 0 <= value <= 1 or (value == 1 and not closed):  # NaN fails the first comparison
        percent = f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}.{percent}")
    return float(value)


def _check_tolerance(config: SparseConfig) -> None:
    """Raises TypeError or ValueError; numbers of other kinds become int and float."""
    for name in ("tolerance", "max_density"):
        value, closed = getattr(config, name), name == "max_density"
        if value is None and not closed:
            continue
        number = _fraction(name, value, closed)
        if number == 0:
            raise ValueError(f"{name}: got {value!r}; allowed: a number above 0.")
        object.__setattr__(config, name, number)
    probes = config.probes
    if probes is not None and (isinstance(probes, bool) or not isinstance(probes, Integral)):
        raise TypeError(f"probes: got {probes!r}; allowed: an integer of 0 or more, or None.")
    if probes is not None:
        if probes < 0:
            raise ValueError(f"probes: got {probes}; allowed: an integer of 0 or more, or None.")
        object.__setattr__(config, "probes", int(probes))
    asked = "a tolerance" if config.tolerance is not None else "precision='auto'" if config.precision == "auto" else ""
    if probes == 0 and asked:
        raise ValueError(f"probes: got 0 with {asked}; allowed: 1 or more, or None, as they measure the error.")
    if config.tolerance is not None and config.top_p == 1:
        raise ValueError("top_p: got 1 with a tolerance; allowed: below 1, as 1 keeps every block whatever the error.")


def _check_replan(config: SparseConfig) -> None:
    """Raises TypeError or ValueError; an integer of another kind becomes an int."""
    replan = config.replan
    if isinstance(replan, bool) or not isinstance(replan, Integral):
        raise TypeError(f"replan: got {replan!r}; allowed: an integer of 1 or more, in denoising steps.")
    if replan < 1:
        raise ValueError(f"replan: got {replan}; allowed: 1 (in every call) or more, in denoising steps.")
    object.__setattr__(config, "replan", int(replan))
    if not isinstance(config.kept_lists, bool):
        raise TypeError(f"kept_lists: got {config.kept_lists!r}; allowed: True or False.")
    if config.kept_lists and replan == 1:
        raise ValueError(
            "kept_lists: got True with replan=1, which makes lists anew in every step; allowed: with a replan of 2 or "
            "more, such as replan=4."
        )
    if config.kept_lists and config.tolerance is not None:
        raise ValueError(
            f"kept_lists: got True with tolerance={config.tolerance}; allowed: False, as a tolerance says in every "
            "step how many blocks are kept. Orders are kept with it: pass replan alone."
        )


def _block_size(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"block_size: got {value!r}; allowed: an integer multiple of 16, such as 64 or 128.")
    if value <= 0 or value % 16:
        raise ValueError(f"block_size: got {value}; allowed: a positive multiple of 16, such as 64 or 128.")
    return int(value)


def _steps(name: str, value: int | float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; allowed: a count (5) or a fraction below 1 (0.1).")
    whole = isinstance(value, Integral)
    if not value >= 0 or (not whole and value >= 1):
        raise ValueError(
            f"{name}: got {value!r}; allowed: an integer count of 0 or more, or a float fraction in [0, 1). "
            "For a count, pass an int."
        )
    return int(value) if whole else float(value)


def _layers(value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"dense_layers: got {value!r}; allowed: layer indices, such as (0, 1).")
    layers = tuple(value)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"dense_layers: got {layer!r}; allowed: integers, such as (0, 1).")
        if layer < 0:
            raise ValueError(f"dense_layers: got {layer}; allowed: 0 or more, counted from the first layer.")
    return tuple(int(layer) for layer in layers)


def _count(name: str, steps: int | float, total_steps: int | None) -> int:
    if isinstance(steps, int):
        return steps
    if steps == 0:
        return 0
    if total_steps is None:
        raise RuntimeError(
            f"{name}={steps} is a fraction, but the number of denoising steps is unknown. "
            "Enable on the whole pipeline, tell it with handle.set_step(step, total), or give a count."
        )
    return math.floor(steps * total_steps + 0.5)
