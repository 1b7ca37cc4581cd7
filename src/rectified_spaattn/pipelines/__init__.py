"""diffusers pipelines: enable, Handle and the table of supported transformers."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'enable() needs diffusers 0.41 or newer. Install it with: pip install "rectified-spaattn[diffusers]"'
    ) from error

from .adapters import ADAPTERS, SupportedModel, supported
from .enabling import disable, enable
from .handle import Handle
from .parallel import Parallelism, parallelize
from .stats import LayerStats, RunStats

__all__ = [
    "ADAPTERS",
    "Handle",
    "LayerStats",
    "Parallelism",
    "RunStats",
    "SupportedModel",
    "disable",
    "enable",
    "parallelize",
    "supported",
]
