"""What sparse attention can do for a model at a size, without weights: counted, and scaled from what was measured.

Operations are those of one forward of the class with the model's configuration, on PyTorch's meta device.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ...backends import choose
from ...config import SparseConfig, nearest
from ...layout import TokenLayout
from ...method.density import density
from ...method.select import top_k_of
from ...pipelines.adapters import adapter_for
from ...presets import preset as preset_of
from ..clips.hub import from_hub, read_index
from ..clips.models import demo_source
from ..clips.options import DEMO, ClipError, ModelOptions
from .architecture import Grid, Model
from .models import MODELS
from .op import OpResult
from .op import measure as measure_op
from .paper_models import PAPER_MODELS
from .settings import AdviseSettings, OpSettings
from .shapes import BenchError, Case, Shape, Watch

_CONFIG = "transformer/config.json"
_DEMO_TEXT = 32
_UNCOUNTED = ("Cosmos3OmniTransformer",)  # asks for autocast on its device, which the meta device has not
_LAYERS = ("num_layers", "num_single_layers")


class Measured(NamedTuple):
    """Milliseconds of one mode. sparse: backend -> (what grows with the pairs, what grows with the tokens)."""

    card: str
    shape: str
    tokens: int
    heads: int
    head_dim: int
    rectify: str
    density: float
    dense_ms: float
    sparse: dict[str, tuple[float, float]]


# from docs/data/op-speed-ours.csv and op-stages-ours.csv, in 16 bits at 90%; a test compares them
MEASURED = Measured(
    card="NVIDIA H100 80GB HBM3",
    shape="hunyuan-video",
    tokens=115_456,
    heads=24,
    head_dim=128,
    rectify="query+slope",
    density=0.1099,
    dense_ms=263.32,
    sparse={"triton": (31.19, 9.10), "fa4": (25.23, 17.28)},
)


class Expected(NamedTuple):
    """Milliseconds of attention in one layer of one forward."""

    backend: str
    dense_ms: float
    sparse_ms: float

    @property
    def ratio(self) -> float:
        return self.dense_ms / self.sparse_ms


class Advice(NamedTuple):
    """One model at one size.

    shape      of its self-attention; blocks: whole ones, leftover: video tokens in none
    config     of the first transformer; preset: its name
    density    computed pairs of a sparse call, at least: what the sparsity says; of_run: of a whole run, its dense
               steps and layers counted as 1
    attention  floating-point operations of self-attention in one forward, 4 * S^2 * heads * head_dim a layer and
               sample; total: of the whole forward, by torch's FlopCounterMode, None where that cannot count
    expected   by backend, scaled from MEASURED
    """

    model: Model
    shape: Shape
    blocks: int
    leftover: int
    config: SparseConfig
    preset: str
    density: float
    of_run: float
    attention: int
    total: int | None
    expected: list[Expected]

    @property
    def share(self) -> float | None:
        """Of attention in the operations of a forward."""
        return None if self.total is None else self.attention / self.total

    @property
    def at_best(self) -> float | None:
        """How much fewer operations a run has than with full attention."""
        return None if self.share is None else 1 / (1 - self.share * (1 - self.of_run))


def advise(settings: AdviseSettings) -> Advice:
    """Everything that needs no GPU. Raises BenchError, or ValueError for a size or setting that does not fit."""
    model, pipeline = model_of(settings.model)
    shape = replace(model.shape, grid=model.grid(settings.height, settings.width, settings.frames))
    config, preset = _config_of(model, pipeline, settings)
    blocks = shape.video // config.block_size
    if not blocks:
        raise BenchError(
            f"{model.name}: {shape.video} video tokens are less than one block of {config.block_size}, so nothing runs "
            "sparse. Use a larger --height, --width or --frames, or a smaller --block-size."
        )
    pairs = nominal_density(config, shape)
    dense_steps = config.dense_step_count(model.steps) + config.dense_last_step_count(model.steps)
    sparse = (1 - len(config.dense_layers) / model.layers) * (1 - dense_steps / model.steps)
    attention = 4 * model.batch * shape.tokens**2 * shape.heads * shape.head_dim * model.layers
    return Advice(
        model=model,
        shape=shape,
        blocks=blocks,
        leftover=shape.video - blocks * config.block_size,
        config=config,
        preset=preset,
        density=pairs,
        of_run=1 - sparse * (1 - pairs),
        attention=attention,
        total=None if model.transformer in _UNCOUNTED else operations(model, shape.grid),
        expected=expected(shape, pairs, model.batch),
    )


def model_of(name: str) -> tuple[Model, Any]:
    """A model by name, or of a pipeline's folder or repository, and what its preset is read from besides: its index.

    Raises BenchError for another class than those of PAPER_MODELS, or what cannot be had.
    """
    if name in MODELS:
        return MODELS[name], None
    if name == DEMO:
        base, config = MODELS["hunyuan-video"], json.loads((demo_source().folder / _CONFIG).read_text())
        small = replace(base.shape, grid=(16, 16, 16), text=_DEMO_TEXT)
        demo = replace(_with_config(base, DEMO, config), shape=_with_heads(small, config), stride=(1, 4, 4), steps=12)
        return demo, None
    if not Path(name).is_dir() and "/" not in name:
        known = [*MODELS, DEMO]
        raise BenchError(
            f"model: got {name!r}; allowed: {', '.join(known)}, or the folder or repository of a diffusers pipeline."
            f"{nearest(name, known)}"
        )
    try:
        config, index = _read(name)
    except ClipError as error:
        raise BenchError(str(error)) from error
    kind = config.get("_class_name")
    kin = [each for each in PAPER_MODELS if each.transformer == kind]
    if not kin:
        raise BenchError(f"{name}: got a {kind}; allowed here: {sorted({m.transformer for m in PAPER_MODELS})}.")
    base = next((each for each in kin if each.config["in_channels"] == config.get("in_channels")), kin[0])
    transformers = {slot: True for slot in ("transformer_2",) if index.get(slot, [None])[0]}
    pipeline = SimpleNamespace(config=SimpleNamespace(**index), **transformers)
    model = _with_config(base, Path(name).name, config)
    return replace(model, shape=_with_heads(base.shape, config)), pipeline


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transformer's config.json and model_index.json."""
    options = ModelOptions(model=name)
    index, folder, revision = read_index(options)
    path = folder / _CONFIG
    if revision is not None:
        from huggingface_hub import hf_hub_download

        path = Path(from_hub(options, partial(hf_hub_download, name, _CONFIG, revision=revision)))
    if not path.is_file():
        raise ClipError(f"{name}: got a pipeline without {_CONFIG}; allowed: one with a transformer.")
    return json.loads(path.read_text(encoding="utf-8")), index


def _with_config(base: Model, name: str, config: dict[str, Any]) -> Model:
    own = {key: value for key, value in config.items() if value is not None and not key.startswith("_")}
    kinds = {kind: own.pop(kind) for kind in _LAYERS if kind in own}
    for key in ("num_attention_heads", "attention_head_dim"):
        own.pop(key)
    return replace(base, name=name, config=own, unit=kinds, units=1, paper={}, paper_composed=None)


def _with_heads(shape: Shape, config: dict[str, Any]) -> Shape:
    return replace(shape, heads=config["num_attention_heads"], head_dim=config["attention_head_dim"])


def _config_of(model: Model, pipeline: Any, settings: AdviseSettings) -> tuple[SparseConfig, str]:
    """What `enable` would take for this model, changed by what was asked for, and the name of the preset."""
    name = settings.preset or model.preset
    if settings.preset is None and pipeline is not None:
        transformer = _on_meta(model, 1)
        name = adapter_for(transformer).preset_of(transformer, pipeline)
    return preset_of(name)[0].replace(**settings.overrides()), name


def _on_meta(model: Model, units: int) -> Any:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, model.transformer)(**model.arguments(units)).eval()


def operations(model: Model, grid: Grid) -> int:
    """Floating-point operations of one forward: matrix products, convolutions and attention; a multiply-add is two.

    Raises BenchError where the transformer does not take so many tokens.
    """
    if model.units == 1:
        return _operations(model, grid, 1)
    one, two = (_operations(model, grid, units) for units in (1, 2))
    return one + (model.units - 1) * (two - one)


@torch.no_grad()
def _operations(model: Model, grid: Grid, units: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    transformer = _on_meta(model, units)
    inputs = model.inputs(model, grid, lambda *shape: torch.empty(shape, device="meta"))
    try:
        with FlopCounterMode(display=False) as counter:
            transformer(**inputs, return_dict=False)
    except (IndexError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, grid))
        raise BenchError(
            f"{model.name}: got a grid of {size} tokens (frames, rows, columns), at which {model.transformer} raises "
            f"{type(error).__name__}: {error}. Use smaller --frames, --height or --width."
        ) from error
    return counter.get_total_flops()


def nominal_density(config: SparseConfig, shape: Shape) -> float:
    """Computed pairs over all pairs where exactly as many blocks are kept as the sparsity says."""
    blocks = shape.video // config.block_size
    mask = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool)
    mask[..., : top_k_of(config, blocks)] = True
    layout = TokenLayout.build(shape.grid, shape.text, shape.text_first)
    return float(density(mask, layout, config, None))


def expected(shape: Shape, pairs: float, batch: int = 1, measured: Measured = MEASURED) -> list[Expected]:
    """Of one layer: what grows with the computed pairs, and with the tokens, each scaled from what was measured."""
    width = batch * shape.heads * shape.head_dim / (measured.heads * measured.head_dim)
    linear = width * shape.tokens / measured.tokens
    square = linear * shape.tokens / measured.tokens
    return [
        Expected(name, measured.dense_ms * square, of_pairs * square * pairs / measured.density + of_tokens * linear)
        for name, (of_pairs, of_tokens) in measured.sparse.items()
    ]


def measure(advice: Advice, device: torch.device, watch: Watch, repeats: int = 3) -> OpResult:
    """One attention call of this shape here, checked and timed as `bench op` does, on random numbers.

    On a GPU in bfloat16 against cuDNN, on a CPU in float32 against PyTorch. Raises BenchError where a result is wrong.
    """
    gpu = device.type == "cuda"
    settings = OpSettings(
        shape=("tiny",), sparsity=(advice.config.sparsity,), repeats=repeats, baseline=("cudnn" if gpu else "sdpa",)
    )
    asked = {name: getattr(advice.config, name) for name in ("rectify", "order", "block_size")}
    dtype = torch.bfloat16 if gpu else torch.float32
    case = Case(replace(advice.shape, name=advice.model.name), settings.config(**asked), dtype, device)
    return measure_op(case, replace(settings, backend=(choose("auto", case.call()),)), watch)
