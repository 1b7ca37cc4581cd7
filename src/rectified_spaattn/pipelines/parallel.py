"""parallelize: one pipeline over several processes by diffusers' context parallelism."""

import functools
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from .adapters import Adapter, adapter_for
from .enabling import transformers_of
from .plans import cp_plan, has_own_plan, heads_of, why_not_cut
from .processor import cut_processor


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """What `parallelize` did. rank: of this process; heads: that each rank attends with, by transformer."""

    ranks: int
    rank: int
    device: str
    uneven: bool
    heads: dict[str, int]
    plans: dict[str, str]

    def __str__(self) -> str:
        lengths = "of any length" if self.uneven else f"of lengths that {self.ranks} divides"
        lines = [
            f"Context parallelism (Ulysses) over {self.ranks} processes; this is rank {self.rank} on {self.device}"
        ]
        lines += [f"  {name}: {heads} heads a rank, plan {self.plans[name]}" for name, heads in self.heads.items()]
        return "\n".join([*lines, f"  video and text {lengths}", "  every process must be given the same seed"])


def parallelize(pipe_or_transformer: Any, ulysses_degree: int | None = None, *, uneven: bool = False) -> Parallelism:
    """Share every forward of a supported pipeline (or transformer) between the processes that torchrun started.

    Every rank has a part of the tokens; for attention they exchange them, so that each has all tokens of its heads.
    ulysses_degree: how many processes, all by default. uneven: whether lengths of video and text may be no multiples
    of that, which costs a small exchange more in every layer, and compiled blocks. Joins the processes where
    torch.distributed has not; move the model to the device of its rank, torch.cuda.current_device(), afterwards.
    Comes before or after `enable`. All processes have to call it, and then the pipeline, with the same arguments: the
    noise from a generator with the same seed.

    Raises TypeError, ValueError or RuntimeError on every rank alike for what cannot work.
    """
    transformers, _ = transformers_of(pipe_or_transformer)
    adapters = [adapter_for(model) for _, model in transformers]
    _join_processes()
    world = dist.get_world_size()
    ranks = world if ulysses_degree is None else ulysses_degree
    if ranks != world or world == 1:
        raise ValueError(
            f"ulysses_degree: got {ranks} with {world} process(es); allowed: as many as there are, 2 or more. Start "
            f"them with torchrun --nproc-per-node {max(ranks, 2)}."
        )
    for (name, model), adapter in zip(transformers, adapters, strict=True):
        if getattr(model, "_parallel_config", None) is not None:
            raise RuntimeError(f"{name}: it is cut over processes already, which diffusers cannot undo. Load it anew.")
        reason = why_not_cut(model, adapter, ranks)
        if reason is not None:
            raise RuntimeError(f"{name}: {reason}")
    for (_, model), adapter in zip(transformers, adapters, strict=True):
        mesh = _mesh(dist.group.WORLD, ranks)
        _cut(model, adapter, ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=uneven, mesh=mesh))
    both = list(zip(transformers, adapters, strict=True))
    return Parallelism(
        ranks=ranks,
        rank=dist.get_rank(),
        device=str(_device()),
        uneven=uneven,
        heads={name: heads_of(model, adapter) // ranks for (name, model), adapter in both},
        plans={name: "of this package" if has_own_plan(model) else "of diffusers" for name, model in transformers},
    )


def _join_processes() -> None:
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise RuntimeError(
                "parallelize: got a single process; allowed: several, as torchrun --nproc-per-node 2 script.py starts "
                "them, or ones that called torch.distributed.init_process_group()."
            )
        dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(_device())


@functools.cache
def _mesh(world: Any, ranks: int) -> Any:
    """diffusers' mesh of all processes: models share its communicators, each of which takes memory of the GPU."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type
    return dist.device_mesh.init_device_mesh(kind, (1, ranks), mesh_dim_names=("ring", "ulysses"))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank() % torch.cuda.device_count()))
    return torch.device("cuda", local)


def _cut(model: Any, adapter: Adapter, config: ContextParallelConfig) -> None:
    attentions: list[Any] = [module for _, module in adapter.attentions(model)]
    for module in attentions:
        able = cut_processor(module.processor)
        if able is not module.processor:
            module.set_processor(able)
    model.enable_parallelism(config=config, cp_plan=cp_plan(model))
    _find_parameters(model)
    if not has_own_plan(model):
        return
    ours = {id(module) for module in attentions}
    for module in model.modules():  # of the others, each sees whole keys on every rank
        processor: Any = getattr(module, "processor", None)
        if id(module) not in ours and getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None


def _find_parameters(model: Any) -> None:
    """Tells the hooks that cut which arguments they cut: some versions of torch cannot compile how they find out."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            metadata = getattr(hook, "module_forward_metadata", None)
            if metadata is not None and metadata.cached_parameter_indices is None:
                names = list(inspect.signature(metadata._cls.forward).parameters)[1:]
                metadata.cached_parameter_indices = {name: index for index, name in enumerate(names)}
