"""TeaCache for diffusers pipelines: denoising steps that change little are not computed."""

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
