"""TeaCache for diffusers pipelines: denoising steps that change little are not computed."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'enable_teacache() needs diffusers 0.41 or newer. Install it with: pip install "rectified-spaattn[diffusers]"'
    ) from error

from .handle import BranchStats, TeaCacheHandle, TeaCacheStats
from .models import CACHED_MODELS, Fit
from .teacache import disable_teacache, enable_teacache

__all__ = [
    "CACHED_MODELS",
    "BranchStats",
    "Fit",
    "TeaCacheHandle",
    "TeaCacheStats",
    "disable_teacache",
    "enable_teacache",
]
