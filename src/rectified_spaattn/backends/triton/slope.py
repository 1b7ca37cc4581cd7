"""Stage 5 on a GPU where the rule has a slope: how a head's values follow its keys within dropped blocks."""

import math

import torch
import triton
import triton.language as tl

from ...method.inputs import Inputs
from ...method.plan import Choices
from . import columns_of
from .tile import Tiled

PROGRAMS = 264  # of the product over tokens; two for every multiprocessor of the largest GPU


def slope(inputs: Inputs, tiled: Tiled, choices: Choices, bias: torch.Tensor) -> torch.Tensor:
    """scale * H, [B, H, D, D] in the inputs' dtype, as method.slope.slope.

    bias: of the tail, [B, H, nb, nb], -inf where a block is not compensated.
    """
    batch, heads, nb, _ = bias.shape
    block, head_dim = inputs.blocks.block_size, tiled.k.shape[3]
    mass = torch.empty(batch, heads, nb, dtype=torch.float32, device=bias.device)
    _mass_kernel[(triton.cdiv(nb, 64), batch * heads)](
        choices.probability, bias, mass, nb, math.log(block), BLOCK=64, num_warps=4
    )
    parts = min(nb, triton.cdiv(PROGRAMS, batch * heads))
    partial = torch.empty(batch, heads, parts, head_dim, head_dim, dtype=torch.float32, device=bias.device)
    columns = columns_of(head_dim)
    at_once = min(columns, 128)
    _slope_kernel[(parts, batch * heads, columns // at_once)](
        tiled.k, tiled.v, tiled.pooled.k, tiled.pooled.v, mass, partial, nb, tiled.pooled.k[0].numel(), inputs.group,
        inputs.scale / (nb * block), WIDTH=triton.next_power_of_2(nb),
        BLOCK=block, ROWS=64 if columns <= 128 else 32, HEAD_DIM=head_dim, COLUMNS=columns, AT_ONCE=at_once,
        num_warps=8,
    )  # fmt: skip
    return partial.sum(2).to(tiled.k.dtype)


@triton.jit
def _mass_kernel(probability_ptr, bias_ptr, mass_ptr, num_blocks, log_b, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, num_blocks, BLOCK):
        n = first + tl.arange(0, BLOCK)
        row = (head * num_blocks + n)[:, None]
        inside = (n[:, None] < num_blocks) & (m[None, :] < num_blocks)
        # [BLOCK, BLOCK]
        bias = tl.load(bias_ptr + row * num_blocks + m[None, :], mask=inside, other=float("-inf"))
        probability = tl.load(probability_ptr + row * (num_blocks + 1) + m[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(bias == float("-inf"), 0.0, probability * tl.exp(bias - log_b)), 0)
    tl.store(mass_ptr + head * num_blocks + m, total, mask=m < num_blocks)


@triton.jit
def _slope_kernel(
    k_ptr, v_ptr, k_mean_ptr, v_mean_ptr, mass_ptr, partial_ptr, num_blocks, half, group, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    mass_ptr += head * num_blocks
    # [WIDTH]
    every = tl.arange(0, WIDTH)
    whole = tl.sum(tl.load(mass_ptr + every, mask=every < num_blocks, other=0.0), 0)
    i = tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    e = tl.program_id(2) * AT_ONCE + tl.arange(0, AT_ONCE)
    # [COLUMNS, AT_ONCE]
    total = tl.zeros((COLUMNS, AT_ONCE), tl.float32)
    steps: tl.constexpr = BLOCK // ROWS
    each = tl.cdiv(num_blocks, tl.num_programs(0))
    first = tl.program_id(0) * each
    for step in tl.range(0, tl.minimum(each, num_blocks - first) * steps):
        m = first + step // steps
        # the root of a weight goes to keys and values each, 1 on average: float16 holds them all
        root = tl.sqrt(tl.where(whole == 0, 0.0, tl.load(mass_ptr + m) / whole) * num_blocks)
        block = head // group * num_blocks + m
        # [ROWS, COLUMNS] and [ROWS, AT_ONCE]
        at = (block * BLOCK + step % steps * ROWS + i)[:, None] * HEAD_DIM
        k = _apart(k_ptr + at, k_mean_ptr + block * HEAD_DIM, d[None, :], half, root, HEAD_DIM)
        v = _apart(v_ptr + at, v_mean_ptr + block * HEAD_DIM, e[None, :], half, root, HEAD_DIM)
        total = tl.dot(tl.trans(k), v, total, input_precision="ieee")
    part = head * tl.num_programs(0) + tl.program_id(0)
    to = partial_ptr + (part * HEAD_DIM + d[:, None]) * HEAD_DIM + e[None, :]
    tl.store(to, total * scale, mask=(d[:, None] < HEAD_DIM) & (e[None, :] < HEAD_DIM))


@triton.jit
def _apart(x_ptr, mean_ptr, d, half, root, HEAD_DIM: tl.constexpr):
    """x less its block's mean, times root; 0 where that is 0, as what no tail holds need not be finite."""
    x = tl.load(x_ptr + d, mask=d < HEAD_DIM, other=0.0)
    mean = tl.load(mean_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    mean += tl.load(mean_ptr + half + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return tl.where(root > 0, (x.to(tl.float32) - mean) * root, 0.0).to(x.dtype)
