"""Rectified SpaAttn: training-free block-sparse attention for video diffusion transformers, with its biases repaired.

Importing this package needs torch alone; `enable` and `enable_teacache` need diffusers when they are called.
Warnings say what is not as it was asked for. The logger "rectified_spaattn" says at INFO what was enabled, which runs
began and what they did, at DEBUG what every forward did.
"""

import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # what to show is the application's choice

if TYPE_CHECKING:
    from .attention import Plan, SparseStats, attend, plan, rectified_attention
    from .config import SparseConfig
    from .layout import TokenLayout
    from .pipelines import Handle, Parallelism, SupportedModel, disable, enable, parallelize, supported
    from .pipelines.teacache import TeaCacheHandle, TeaCacheStats, disable_teacache, enable_teacache
    from .presets import PRESETS, preset

_NAMES = {  # by the module that they are imported from when they are asked for
    "attention": ("Plan", "SparseStats", "attend", "plan", "rectified_attention"),
    "config": ("SparseConfig",),
    "layout": ("TokenLayout",),
    "pipelines": ("Handle", "Parallelism", "SupportedModel", "disable", "enable", "parallelize", "supported"),
    "pipelines.teacache": ("TeaCacheHandle", "TeaCacheStats", "disable_teacache", "enable_teacache"),
    "presets": ("PRESETS", "preset"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "PRESETS",
    "Handle",
    "Parallelism",
    "Plan",
    "SparseConfig",
    "SparseStats",
    "SupportedModel",
    "TeaCacheHandle",
    "TeaCacheStats",
    "TokenLayout",
    "attend",
    "disable",
    "disable_teacache",
    "enable",
    "enable_teacache",
    "parallelize",
    "plan",
    "preset",
    "rectified_attention",
    "supported",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rectified_spaattn' has no attribute {name!r}; it has {__all__}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
