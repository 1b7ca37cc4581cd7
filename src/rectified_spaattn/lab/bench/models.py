"""The models that `bench model` knows, by name and by size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from .architecture import Model
from .later_models import LATER_MODELS
from .paper_models import PAPER_MODELS

MODELS: Mapping[str, Model] = MappingProxyType({model.name: model for model in (*PAPER_MODELS, *LATER_MODELS)})

_TINY_WIDTHS = {"text_embed_dim": 32, "pooled_projection_dim": 16, "text_dim": 32, "ffn_dim": 64, "image_dim": 32}
_TINY_WIDTHS |= {"joint_attention_dim": 32, "num_refiner_layers": 1, "hidden_size": 32, "time_embed_hidden_dim": 32}
_TINY_WIDTHS |= {"ff_dim": 64, "in_text_dim": 32, "in_text_dim2": 32, "intermediate_size": 64, "vocab_size": 64}
_TINY_WIDTHS |= {"time_dim": 32, "num_text_blocks": 1}


def tiny(model: Model) -> Model:
    """The same architecture with two heads, narrow layers, six units and 576 tokens: seconds on a CPU.

    Head size and rotary axes stay, so that the kernels run it, too.
    """
    config = {**model.config, **{name: width for name, width in _TINY_WIDTHS.items() if name in model.config}}
    if "added_kv_proj_dim" in config:
        config["added_kv_proj_dim"] = 2 * model.shape.head_dim
    grid = (1, 24, 24) if model.shape.grid[0] == 1 else (4, 12, 12)
    shared = None if model.shape.kv_heads is None else 1
    shape = replace(model.shape, grid=grid, text=min(16, model.shape.text), heads=2, kv_heads=shared)
    return replace(model, config=config, shape=shape, units=6, paper={}, paper_composed=None)


SIZES: Mapping[str, Callable[[Model], Model]] = MappingProxyType({"full": lambda model: model, "tiny": tiny})
