"""The operator as one node for torch.compile: a torch.library custom op with a fake.

Arguments are plain values, as the schema of an op wants them; the layout is looked up in its cache.
"""

import torch

from .backends import BACKENDS, Call
from .backends.call import why_no_kernels
from .config import SparseConfig
from .curve import CONTENT
from .layout import TokenLayout
from .method.arrange import content_order

_PLAN_DTYPE = torch.float32


@torch.library.custom_op("rectified_spaattn::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_mask: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    grid: list[int],
    text: int,
    text_first: bool,
    block_size: int,
    order: str,
    sparsity: float,
    top_p: float,
    rectify: str,
    neighbours: bool,
    first_frame: bool,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, block_mask, compensated, probability, r, token_order, as rectified_attention describes them.

    token_order is empty where the layout is one for all heads.
    """
    layout = TokenLayout.build((grid[0], grid[1], grid[2]), text, text_first, block_size, order)
    config = SparseConfig(
        sparsity=sparsity,
        top_p=top_p,
        rectify=rectify,  # type: ignore[arg-type]  # the schema has no Literal; SparseConfig checks it
        order=order,
        neighbours=neighbours,
        first_frame=first_frame,
    )
    valid = text_mask if text_mask is not None else q.new_ones(q.shape[0], text, dtype=torch.bool)
    if block_mask is not None:
        block_mask = block_mask.contiguous()
    # the stages choose their dtypes themselves; kernels are launched on the current GPU, which need not be q's
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        token_order = None
        if layout.by_content:
            token_order = order_by_content(q, k, layout.on(q.device), scale)
        out, plan = BACKENDS[backend].run(q, k, v, layout, config, valid, scale, block_mask, token_order)
    # an op may not return one of its inputs
    critical = plan.block_mask.clone() if plan.block_mask is block_mask else plan.block_mask
    if token_order is None:
        token_order = layout.tiled.new_empty(0, device=q.device)
    return out, critical, plan.compensated, plan.probability, plan.r, token_order


def order_by_content(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, scale: float) -> torch.Tensor:
    """int64 [B, H, nb * b], whichever backend attends: by our kernels where they can run, else by PyTorch."""
    call = Call(q.device, q.dtype, q.shape[-1], layout.block_size, layout.num_blocks)
    if why_no_kernels(call) is not None:
        return content_order(q, k, layout.tiled, block_size=layout.block_size, scale=scale)
    from .kernels import arrange

    return arrange.content_order(q, k, layout, scale)


@attention.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_mask: torch.Tensor | None,
    block_mask: torch.Tensor | None,
    grid: list[int],
    text: int,
    text_first: bool,
    block_size: int,
    order: str,
    sparsity: float,
    top_p: float,
    rectify: str,
    neighbours: bool,
    first_frame: bool,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = torch.float64 if backend == "reference" else None
    nb = grid[0] * grid[1] * grid[2] // block_size
    square = (q.shape[0], q.shape[2], nb, nb)
    return (
        q.new_empty(q.shape, dtype=exact or q.dtype),
        q.new_empty(square, dtype=torch.bool),
        q.new_empty(square, dtype=torch.bool),
        q.new_empty((*square[:3], nb + 1), dtype=exact or _PLAN_DTYPE),
        q.new_empty(square[:3], dtype=exact or _PLAN_DTYPE),
        q.new_empty((*square[:2], nb * block_size) if order == CONTENT else (0,), dtype=torch.int64),
    )
