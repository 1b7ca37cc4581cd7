"""The processes that share the forwards of one model by context parallelism."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..layout import TokenLayout, part_sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """Every one of them is a part of each stream of tokens, and inside attention all tokens of a part of the heads.

    group   torch.distributed's; count: how many; rank: which this one is
    uneven  whether parts may differ in length
    """

    group: Any
    count: int
    rank: int
    uneven: bool

    def part(self, streams: Sequence[int], rank: int) -> int:
        """How many tokens of these streams a rank has outside of attention."""
        return sum(part_sizes(length, self.count)[rank] for length in streams)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[count, ...]: x of every rank, rank after rank. All of them have to call it. Does not wait for a GPU."""
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def check_same(self, x: torch.Tensor, name: str) -> None:
        """Raises RuntimeError on all of them where one starts from other noise. Waits for the device."""
        flat = x.detach().flatten()
        some = flat[torch.arange(256, device=x.device) * flat.numel() // 256].float()
        told = self.gather(torch.cat([some, some.new_tensor([flat.numel()])]))  # as long whatever the shape
        if not torch.allclose(told, told[:1].expand_as(told), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise RuntimeError(
                f"{name}: the processes that share it start from different latents, so none would get a video. Give "
                "each the same: generator=torch.Generator().manual_seed(seed) in the call of the pipeline."
            )

    def join(self, mask: torch.Tensor, streams: Sequence[int]) -> torch.Tensor:
        """bool [..., S] of the parts [..., part] that the ranks have. All of them have to call it."""
        sizes = [self.part(streams, rank) for rank in range(self.count)]
        padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, max(sizes) - mask.shape[-1]))
        parts = self.gather(padded).unbind()
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1).bool()


def context_parallel(model: nn.Module | None) -> Any:
    """diffusers' ContextParallelConfig of a model; None where the model is not cut over processes."""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that a model is cut over by Ulysses; None where it is not."""
    config = context_parallel(model)
    if config is None or config.ulysses_degree == 1:
        return None
    return Ranks(
        group=config._ulysses_mesh.get_group(),
        count=config.ulysses_degree,
        rank=config._ulysses_local_rank,
        uneven=config.ulysses_anything,
    )


def streams_of(layout: TokenLayout, packed: bool = False) -> tuple[int, ...]:
    """Lengths of what a model keeps apart outside of attention, in the order of the sequence: what can be tiled, in one
    span, and the text before and behind it; or all tokens, where they are packed into one tensor.
    """
    if packed:
        return (layout.sequence,)
    ((start, end),) = layout.spans
    return tuple(length for length in (start, end - start, layout.sequence - end) if length)
