"""The operator as one node for torch.compile: torch.library custom ops with fakes.

The schema of an op takes plain values, so layout and config travel as their keys.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch

from .backends import BACKENDS
from .backends.calls import Backend
from .config import SparseConfig
from .layout import TokenLayout
from .method import probe as method_probe
from .method.inputs import Inputs
from .method.plan import Choices
from .orders import blocks_of

# inductor must not capture the op in its CUDA graphs: what it does is chosen anew in every call
# (a torch that knows no such tag knows no argument for it, either)
TAGS: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}

SMALL = 256 << 20  # bytes of copies from which on a call asks whether there is room for them


@torch.library.custom_op("rectified_spaattn::attention", mutates_args=(), **TAGS)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_mask: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    token_order: torch.Tensor | None,
    top_k: torch.Tensor | None,
    layout: str,
    config: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, block_mask, compensated, probability, r, token_order, as rectified_attention describes them.

    layout, config: keys. token_order is empty where blocks are the same for all heads.
    """
    # kernels are launched on the current GPU, which need not be q's
    with _no_autocast(q), torch.cuda.device_of(q):
        inputs = _inputs(q, k, v, text_mask, block_mask, token_order, layout, config, scale, BACKENDS[backend])
        inputs = inputs._replace(top_k=top_k)
        choices, out = _run(inputs, BACKENDS[backend])
    critical, order = _outputs(choices, inputs, block_mask, token_order)
    return out, critical, choices.compensated, choices.probability, choices.r, order


@torch.library.custom_op("rectified_spaattn::plan", mutates_args=(), **TAGS)
def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_mask: torch.Tensor | None,
    layout: str,
    config: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """block_mask and token_order of `attention` for the same arguments, without attending."""
    with _no_autocast(q), torch.cuda.device_of(q):
        inputs = _inputs(q, k, v, text_mask, None, None, layout, config, scale, BACKENDS[backend])
        choices, _ = BACKENDS[backend].plan(inputs)
    return _outputs(choices, inputs, None, None)


@torch.library.custom_op("rectified_spaattn::probe", mutates_args=(), **TAGS)
def probe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    text_mask: torch.Tensor | None,
    token_order: torch.Tensor | None,
    layout: str,
    config: str,
    scale: float,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two norms of `method.probe.Probe` for the output of `attention`; token_order: as that gave it, or None."""
    blocks = blocks_of(TokenLayout.from_key(layout), SparseConfig.from_key(config)).on(q.device)
    order = blocks.tiled.expand(len(q), k.shape[2], -1) if token_order is None else token_order
    order = order.repeat_interleave(q.shape[2] // k.shape[2], dim=1)  # query heads that share keys share their order
    valid = None
    if text_mask is not None:
        valid = text_mask.new_ones(q.shape[:2])
        valid[:, blocks.isolated[blocks.leftover :]] = text_mask
    with _no_autocast(q):
        places = method_probe.probe_places(order, rows)
        wrong, full = method_probe.probe(q, k, v, out, places, valid=valid, scale=scale)
    return wrong, full


def _no_autocast(q: torch.Tensor) -> AbstractContextManager[object]:
    """The stages choose their dtypes themselves."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_mask: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    token_order: torch.Tensor | None,
    layout: str,
    config: str,
    scale: float,
    backend: Backend,
) -> Inputs:
    """The call as a backend gets it, sorted by the backend itself where blocks are by content."""
    tokens, settings = TokenLayout.from_key(layout), SparseConfig.from_key(config)
    blocks = blocks_of(tokens, settings).on(q.device)
    if text_mask is None:
        text_mask = blocks.all_text.expand(len(q), -1)
    if block_mask is not None:
        block_mask = block_mask.contiguous()
    inputs = Inputs(q, k, v, blocks, settings, text_mask, scale, block_mask, token_order)
    if blocks.by_content and token_order is None:
        inputs = inputs._replace(token_order=backend.sort(inputs))
    return inputs


def _run(inputs: Inputs, backend: Backend) -> tuple[Choices, torch.Tensor]:
    """All heads at once or, where a backend copies q, k and v and there is no room for that, a few at a time: so that
    a call fits wherever full attention does. Heads know nothing of each other once they are sorted.
    """
    key_heads = inputs.k.shape[2]
    parts = min(key_heads, _parts(inputs)) if backend.copies else 1
    if parts == 1:
        choices, prepared = backend.plan(inputs)
        return choices, backend.attend(inputs, prepared)
    inputs = inputs._replace(out=inputs.new_out())
    edges = [key_heads * part // parts for part in range(parts + 1)]
    chosen = []
    for first, last in pairwise(edges):
        some = inputs.of_key_heads(first, last)
        choices, prepared = backend.plan(some)
        chosen.append(choices)
        backend.attend(some, prepared)
        del prepared
    return Choices(*(torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True))), inputs.new_out()


def _parts(inputs: Inputs) -> int:
    """In how many parts of its heads a call fits into the memory that is left: into half of it, where that is short."""
    copies, count = sum(x.nbytes for x in inputs[:3]), inputs.blocks.num_blocks
    if copies < SMALL:
        return 1
    if inputs.config.precision != "inputs":  # k and v once more in 8 bits, and the output of the listed blocks
        copies += inputs.q.nbytes + (inputs.k.nbytes + inputs.v.nbytes) // 2
    planning = 20 * inputs.q.shape[0] * inputs.q.shape[2] * count * count  # bytes of what is as large as block masks
    device, out = inputs.q.device, inputs.q.nbytes
    if copies + planning <= 0.8 * (_unused(device) - out):
        return 1
    room = _room(device) - out
    if copies + planning <= 0.8 * room:
        return 1
    return math.ceil((copies + planning) / max(1.0, 0.5 * room))


def _unused(device: torch.device) -> float:
    """Bytes that torch holds of the device and nobody uses; infinite where a CUDA graph is captured. Asks no driver."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return math.inf
    held = torch.cuda.memory_stats_as_nested_dict(device)
    return held["reserved_bytes"]["all"]["current"] - held["allocated_bytes"]["all"]["current"]


def _room(device: torch.device) -> float:
    """Bytes of device memory that nobody uses; infinite where that is not known."""
    return torch.cuda.mem_get_info(device)[0] + _unused(device) if device.type == "cuda" else math.inf


def _outputs(
    choices: Choices, inputs: Inputs, block_mask: torch.Tensor | None, token_order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """block_mask and token_order as an op returns them; it may not return one of its inputs."""
    critical, order = choices.block_mask, inputs.token_order
    if critical is block_mask:
        critical = critical.clone()
    if order is None:
        order = torch.empty(0, dtype=torch.int64, device=critical.device)
    return critical, order.to(torch.int64, copy=order is token_order)


@attention.register_fake
def _attention_fake(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    *_, layout, config, _, backend = rest
    tokens, settings = TokenLayout.from_key(layout), SparseConfig.from_key(config)
    exact = torch.float64 if backend == "reference" else None
    nb = tokens.video // settings.block_size
    square = (q.shape[0], q.shape[2], nb, nb)
    return (
        q.new_empty(q.shape, dtype=exact or q.dtype),
        q.new_empty(square, dtype=torch.bool),
        q.new_empty(square, dtype=torch.bool),
        q.new_empty((*square[:3], nb + 1), dtype=exact or torch.float32),
        q.new_empty(square[:3], dtype=exact or torch.float32),
        q.new_empty(
            (k.shape[0], k.shape[2], nb * settings.block_size) if settings.by_content else (0,), dtype=torch.int64
        ),
    )


@probe.register_fake
def _probe_fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    norms = q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)
    return norms, torch.empty_like(norms)


@plan.register_fake
def _plan_fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, block_mask, *_, token_order = _attention_fake(q, *rest)
    return block_mask, token_order
