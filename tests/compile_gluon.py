"""Compiles the kernels in Gluon without a GPU, for Hopper: `python compile_gluon.py`.

Prints a JSON line a kernel: name, shared memory, its instructions that multiply, and those that wait for them: as many
as there are products where ptxas cannot tell that their registers are left alone meanwhile. A process of its own, as
compile_kernels.py.
"""

import json
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import triton
from triton.backends.compiler import GPUTarget

from rectified_spaattn.backends.triton import BlockLists, Prepared, hopper, hopper_eight_bits
from rectified_spaattn.backends.triton.eight_bits import Quantised
from rectified_spaattn.method.rectify import Rectification

BLOCK = 128


class NoGPU:
    """What compiling asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands where a kernel stands: is compiled for what it is launched with, and not launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.made.append(self.kernel.warmup(*args, grid=grid, **options))


class Size(NamedTuple):
    heads: int
    blocks: int


SOME, ONE = Size(2, 5), Size(1, 1)  # Triton makes constants of integers that are 1


def attend(size: Size, dtype: torch.dtype, tail: bool, slope: bool, own: bool) -> None:
    (heads, num_blocks), head_dim = size, BLOCK
    rows = (num_blocks + 1) * BLOCK
    q, blocks, isolated = (torch.zeros(1, heads, n, head_dim, dtype=dtype) for n in (rows, num_blocks * BLOCK, BLOCK))
    tiled = SimpleNamespace(
        q=q, k=blocks, v=blocks, k_tail=isolated, v_tail=isolated, tail_bias=torch.zeros(1, BLOCK),
        tail_end=torch.zeros(1, dtype=torch.int32),
        order=torch.zeros(1, heads, num_blocks * BLOCK, dtype=torch.int32) if tail else None,
    )  # fmt: skip
    bias = torch.zeros(1, heads, num_blocks, num_blocks)
    k_var = torch.zeros(2, 1, heads, num_blocks, head_dim, dtype=torch.bfloat16) if own else None
    pooled = SimpleNamespace(k=isolated, v=isolated, bias=bias, k_var=k_var) if tail else None
    slopes = torch.zeros(1, heads, head_dim, head_dim, dtype=dtype) if slope else None
    r, c = torch.zeros(1, heads, num_blocks), torch.zeros(1, heads, num_blocks, head_dim)
    places = torch.zeros(rows, dtype=torch.int32)
    inputs = SimpleNamespace(group=1, blocks=SimpleNamespace(num_blocks=num_blocks, places=places), scale=0.1)
    prepared = Prepared(cast(Any, tiled), lists(size), Rectification(r, c, cast(Any, pooled), slopes))
    turns = lists(size).counts if tail else None
    out, lse = q.transpose(1, 2), torch.zeros(1, heads, rows)
    hopper.attend(cast(Any, inputs), prepared, num_blocks + 1, turns, out, lse)


def listed(size: Size) -> None:
    heads, num_blocks = size
    q = torch.zeros(1, heads, (num_blocks + 1) * BLOCK, BLOCK, dtype=torch.bfloat16)
    eight = torch.zeros(1, heads, num_blocks * BLOCK, BLOCK, dtype=torch.float8_e4m3fn)
    scales, shifts = torch.ones(1, heads, num_blocks), torch.zeros(1, heads, BLOCK)
    of = Quantised(eight, eight.unflatten(2, (num_blocks, BLOCK)), scales, scales, shifts, shifts)
    inputs = SimpleNamespace(group=1, blocks=SimpleNamespace(num_blocks=num_blocks), scale=0.1)
    tiled, lse = SimpleNamespace(q=q), torch.zeros(q.shape[:3])
    hopper_eight_bits.launch(cast(Any, inputs), cast(Any, tiled), lists(size), of, lists(size).counts, q, lse, 448.0, 8)


def lists(size: Size) -> BlockLists:
    counts = torch.zeros(1, size.heads, size.blocks + 1, dtype=torch.int32)
    return BlockLists(counts, counts[..., None].expand(-1, -1, -1, size.blocks).contiguous())


def main() -> None:
    triton.runtime.driver.set_active(cast(Any, NoGPU()))
    attends = Compiled(hopper._attend_kernel)
    eight = Compiled(hopper_eight_bits._listed_kernel)
    hopper._attend_kernel, hopper_eight_bits._listed_kernel = cast(Any, attends), cast(Any, eight)
    attend(SOME, torch.bfloat16, True, True, True)
    attend(SOME, torch.float16, True, False, True)
    attend(ONE, torch.bfloat16, False, False, False)
    listed(SOME)
    listed(ONE)
    for name, kernels in (("attend", attends.made), ("listed", eight.made)):
        for kernel in kernels:
            assembly = kernel.asm["sass"]
            line = {"kernel": name, "shared": kernel.metadata.shared, "products": assembly.count("GMMA.64x")}
            print(json.dumps(line | {"waits": assembly.count("WARPGROUP.DEPBAR")}), flush=True)


if __name__ == "__main__":
    main()
