"""The paper's kernels in Triton, one stage a file: (arrange ->) tile and pool -> plan -> attend.

Index lists, rectification and un-reordering are fused into attention. This module imports without Triton.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...method.apart import attend_apart
from ...method.inputs import Inputs
from ...method.plan import Choices
from ...method.rectify import Rectification
from ..calls import Backend, Call, triton_version

if TYPE_CHECKING:
    from .tile import Tiled

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 96, 128, 256)
BLOCK_SIZES = (64, 128)
MAX_BLOCKS = 8191  # one program holds a row of key blocks in registers
OLDEST_TRITON = (3, 4)  # the first with host-side tensor descriptors
GLUON_TRITON = ((3, 6), (3, 9))  # first and last
ROOMY = ("80", "90", "100", "103")  # with 163 KiB of shared memory and more; all others have 99, AMD 64


class BlockLists(NamedTuple):
    """The key blocks of every query block, sorted. Blocks of isolated queries come last and list every key block, or
    none where all of their queries attend to each other only.

    counts: int32 [B, H, rows / b]; indices: int32 [B, H, rows / b, nb], of which the first `counts` are set.
    """

    counts: torch.Tensor
    indices: torch.Tensor


class Prepared(NamedTuple):
    """What `attend` needs: q, k, v in block order, the lists of kept blocks, and what repairs the rest.

    The keys and values of a tail are those of `Tiled`, [B, Hk, nb up to a multiple of 128, D]. So is its k_var,
    [2, B, Hk, nb, D], of which the second half is not read.
    """

    tiled: "Tiled"
    lists: BlockLists
    rectification: Rectification


class Partial(NamedTuple):
    """Attention over the listed blocks alone, done elsewhere: out [B, H, rows, D], any strides with D innermost, and
    its log-sum-exp, float32 [B, H, rows], contiguous. isolated: whether isolated queries attended, too; without, their
    rows are not read.
    """

    out: torch.Tensor
    lse: torch.Tensor
    isolated: bool = True


def arch_of(device: torch.device) -> str:
    """What tilings go by: "hip", or the compute capability as in "90"; the interpreter on a CPU takes Hopper's."""
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return f"{major}{minor}"


def columns_of(head_dim: int) -> int:
    """How wide a tile of whole heads is: a power of two. Its columns from head_dim on are zeros."""
    return 1 << (head_dim - 1).bit_length()


def sort_tokens(inputs: Inputs) -> torch.Tensor:
    """int32 [B, Hk, nb*b]: the tiled tokens of every key head by content."""
    from .arrange import content_order

    return content_order(inputs.q, inputs.k, inputs.blocks, inputs.scale)


def prepare(inputs: Inputs) -> tuple[Choices, Prepared]:
    """Stages 1 to 5, without waiting for the device."""
    from .plan import decide
    from .tile import tile

    tiled = tile(inputs)
    choices, rectification, lists = decide(inputs, tiled)
    return choices, Prepared(tiled, lists, rectification)


def run(inputs: Inputs, prepared: Prepared) -> torch.Tensor:
    """out [B, S, H, D], without waiting for the device.

    A query block left without any key gives NaN (with a tail none is: a compensated block is a key).
    """
    from .attend import attend

    partial = None
    if inputs.config.precision != "inputs" and inputs.blocks.num_blocks:
        from .eight_bits import listed_blocks

        partial = listed_blocks(inputs, prepared)
    out, _ = attend(inputs, prepared, partial)
    attend_apart(inputs, out)
    return out


def why_not(call: Call) -> str | None:
    return _why_no_triton() or _why_not_on(call.device) or _why_not_this(call)


def why_not_gluon(arch: str, block: int, head_dim: int) -> str | None:
    """Why plain Triton does stage 6 and not Gluon (hopper.py); None where Gluon does."""
    version = triton_version() or "0.0"
    if interpreted() or arch != "90":
        return "its products and its split of warps are Hopper's (sm_90)"
    if not GLUON_TRITON[0] <= tuple(int(part) for part in version.split(".")[:2]) <= GLUON_TRITON[1]:
        return f"Triton {version}: Gluon changes its names, and 3.6 to 3.9 were compiled"
    if block != 128 or head_dim != 128:
        return f"blocks of {block} and heads of {head_dim}, it takes 128 and 128"
    return None


def _why_no_triton() -> str | None:
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install triton; on Windows triton-windows)"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old, {oldest} or newer is needed (PyTorch 2.8 or newer brings it)"
    return None


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the kernels run on a GPU, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"
    return None


def _why_not_this(call: Call) -> str | None:
    allowed = (torch.float16, torch.float32) if call.device.type == "cpu" else DTYPES
    if call.dtype not in allowed:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"{str(call.dtype).removeprefix('torch.')} inputs, the kernels take {names}"
    if call.head_dim not in HEAD_DIMS:
        return f"head_dim {call.head_dim}, the kernels take 64, 96, 128 and 256"
    if call.block_size not in BLOCK_SIZES:
        return f"block_size {call.block_size}, the kernels take 64 and 128"
    if call.precision != "inputs" and call.device.type == "cuda":
        if torch.version.hip is not None:
            return f"precision {call.precision!r}, which is for NVIDIA GPUs"
        major, minor = torch.cuda.get_device_capability(call.device)
        if call.precision == "fp8" and (major, minor) < (8, 9):
            return f"precision 'fp8', which sm_{major}{minor} cannot multiply: use precision='int8-qk'"
    if call.num_blocks > MAX_BLOCKS:
        return f"{call.num_blocks} blocks, the kernels take {MAX_BLOCKS}: use a larger block_size"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is for tests: TRITON_INTERPRET=1."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


BACKEND = Backend(why_not=why_not, sorting="triton", sort=sort_tokens, plan=prepare, attend=run, copies=True)
