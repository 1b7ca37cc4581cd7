"""A pytest plugin for diffusers' own tests: every supported transformer that they build is enabled, all blocks kept.

The classes are patched, as no handle on a test's models exists: this is for `make upstream-test` alone.
"""

import functools
import warnings
from importlib import import_module
from typing import Any

from rectified_spaattn.config import SparseConfig
from rectified_spaattn.pipelines import ADAPTERS, enable

ALL_BLOCKS = SparseConfig(sparsity=0.0, top_p=0.0, block_size=16)


def enabled_from_the_start(kind: Any) -> Any:
    """`kind.__init__`, after which the model is enabled."""
    init = kind.__init__

    @functools.wraps(init)
    def enabled_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is kind:
            enable(self, ALL_BLOCKS, backend="torch")

    return enabled_init


def pytest_configure(config: Any) -> None:
    warnings.filterwarnings("ignore", message="rectified_spaattn")
    for name in ADAPTERS:
        kind = getattr(import_module("diffusers"), name)
        kind.__init__ = enabled_from_the_start(kind)
