"""Stock processors that call scaled_dot_product_attention themselves: their calls go through the dispatcher."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AllegroAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_easyanimate import EasyAnimateAttnProcessor2_0
from torch.overrides import TorchFunctionMode

# Each attends once in a call.
REDIRECTED: frozenset[Any] = frozenset(
    {
        AllegroAttnProcessor2_0,
        EasyAnimateAttnProcessor2_0,
        FusedJointAttnProcessor2_0,
        JointAttnProcessor2_0,
    }
)


class Redirected(TorchFunctionMode):
    """Inside, scaled_dot_product_attention is dispatched to a backend of diffusers."""

    def __init__(self, backend: Any, parallel_config: Any) -> None:
        super().__init__()
        self.backend, self.parallel_config = backend, parallel_config

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._dispatch(*args, **(kwargs or {}))  # the mode is off here

    def _dispatch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """query, key, value: [B, H, S, D], as the function takes them. Returns the same."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, backend=self.backend, parallel_config=self.parallel_config, **options
        )
        return out.transpose(1, 2)
