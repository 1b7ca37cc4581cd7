"""Compiles every kernel for one architecture, without a GPU: `python compile_kernels.py 90` (or 80, ..., hip).

Prints a JSON line a kernel: its name, and the shared memory it needs. A process of its own, because Triton's
interpreter, which the tests use, replaces the compiler for good.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rectified_spaattn.kernels.arrange import _directions_kernel, _halve_kernel, _project_kernel
from rectified_spaattn.kernels.attend import _attend_kernel, tiling_of
from rectified_spaattn.kernels.plan import _compensate_kernel, _scores_kernel, _select_kernel
from rectified_spaattn.kernels.tile import _tail_kernel, _tile_kernel

_SELECT_FLAGS = ("TOP_P", "NEIGHBOURS", "FIRST_FRAME", "COMPENSATE", "GAIN", "ROW")


class Kernel(NamedTuple):
    name: str
    function: Any
    types: dict[str, str]  # of all arguments in order, "constexpr" for those in constants
    constants: dict[str, Any]
    options: dict[str, Any]


def kernels(arch: str) -> Iterator[Kernel]:
    """Every kernel at every head size and block size, in bfloat16."""
    x = "bf16"
    for block, head_dim in ((128, 128), (64, 128), (128, 64), (64, 64)):
        shape = {"BLOCK": block, "HEAD_DIM": head_dim}
        contiguous = dict.fromkeys(("q_sd", "k_sd", "v_sd"), 1)
        for mode in ("gapr", "row", "plain") if (block, head_dim) == (128, 128) else ("gapr", "row"):
            flags = {"GAPR": mode == "gapr", "ROW": mode == "row"}
            yield kernel(f"tile {block}x{head_dim} {mode}", _tile_kernel, {**shape, **contiguous, **flags}, x)
        for resume, row in product((False, True) if block == 128 else (False,), (False, True)):
            tiling = tiling_of(arch, block, head_dim, resume)
            constants = {
                **shape,
                "BLOCK_M": tiling.block_m,
                "BLOCK_N": tiling.block_n,
                "RESUME": resume,
                "ROW": row,
                "TAIL_STAGES": tiling.tail_stages,
            }
            options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
            if tiling.maxnreg is not None:
                options["maxnreg"] = tiling.maxnreg
            yield kernel(
                f"attend {block}x{head_dim} resume={resume} row={row}", _attend_kernel, constants, x, **options
            )
    for head_dim in (64, 128):
        for gain, row in ((False, False), (True, False), (False, True)):
            constants = {"HEAD_DIM": head_dim, "BLOCK": 64, "CHUNK": 32, "GAIN": gain, "ROW": row}
            yield kernel(f"scores {head_dim} gain={gain} row={row}", _scores_kernel, constants, x)
        constants = {"HEAD_DIM": head_dim, "BLOCK": 64, "BLOCK_K": 16}
        yield kernel(f"compensate {head_dim}", _compensate_kernel, constants, x)
        tree = {"RANK": 8, "WIDTH": 16}
        constants = {**tree, "DIM": 2 * head_dim, "CHUNK": 32, "ROUNDS": 10}
        yield kernel(f"directions {head_dim}", _directions_kernel, constants, x, num_warps=8)
        constants = {"HEAD_DIM": head_dim, "BLOCK": 64, "WIDTH": 16, "q_sd": 1, "k_sd": 1}
        yield kernel(f"project {head_dim}", _project_kernel, constants, x)
    for chunk, warps in ((8192, 16), (2048, 8), (128, 2)):
        constants = {"FIRST": chunk == 8192, "RANK": 8, "SAMPLE": 64, "CHUNK": chunk}
        yield kernel(f"halve {chunk}", _halve_kernel, constants, x, num_warps=warps)
    yield kernel("tail", _tail_kernel, {"BLOCK": 128}, x)
    for width, warps in ((64, 1), (1024, 2), (8192, 16)):
        for given in (False, True):
            constants = {"WIDTH": width, "GIVEN": given, **dict.fromkeys(_SELECT_FLAGS, True)}
            yield kernel(f"select {width} given={given}", _select_kernel, constants, x, num_warps=warps)
    for compensate in (False, True):
        constants = {"WIDTH": 64, "GIVEN": False, **dict.fromkeys(_SELECT_FLAGS, False), "COMPENSATE": compensate}
        yield kernel(f"select 64 compensate={compensate}, no gain", _select_kernel, constants, x, num_warps=1)


def kernel(name: str, function: Any, constants: dict[str, Any], x: str, **options: Any) -> Kernel:
    types = {
        argument: "constexpr" if argument in constants else type_of(argument, function.__name__, constants, x)
        for argument in function.arg_names
    }
    return Kernel(name, function, types, constants, options)


def type_of(argument: str, kernel: str, constants: dict[str, Any], x: str) -> str:
    if argument.endswith("_desc"):
        rows = constants["BLOCK_M"] if argument == "q_desc" else constants["BLOCK_N"]
        return f"tensordesc<{x}[{rows},{constants['HEAD_DIM']}]>"
    if argument in ("scale", "log_b", "top_p", "cap"):
        return "fp32"
    model_strides = kernel in ("_tile_kernel", "_project_kernel") and argument[1:3] == "_s"
    if argument.endswith(("_sb", "_ss", "_sh", "_sd", "_st")):
        return "i64" if model_strides or argument.endswith("_sb") else "i32"
    if kernel == "_project_kernel" and argument == "places_ptr":
        return "*i64"
    if argument in ("from_ptr", "to_ptr", "count_ptr", "index_ptr", "end_ptr", "places_ptr"):
        return "*i32"
    if argument in ("critical_ptr", "compensated_ptr", "neighbours_ptr", "first_frame_ptr", "worth_ptr", "valid_ptr"):
        return "*i1"
    in_model_dtype = {
        "_tile_kernel": ("q_ptr", "k_ptr", "v_ptr", "q_out", "k_out", "v_out", "k_tail", "v_tail", "k_pool", "v_pool"),
        "_scores_kernel": ("tail_ptr",),
        "_project_kernel": ("q_ptr", "k_ptr", "w_ptr"),
        "_attend_kernel": ("out_ptr", "partial_ptr"),
    }.get(kernel, ())
    if argument in in_model_dtype:
        return f"*{x}"
    halves = {
        "_tile_kernel": ("_mean", "_deviation", "_variance"),
        "_scores_kernel": ("q_ptr", "k_ptr", "k_var_ptr"),
        "_compensate_kernel": ("v_ptr",),
        "_project_kernel": ("out_ptr",),
        "_halve_kernel": ("features_ptr",),
    }
    if argument.endswith(halves.get(kernel, ("nothing",))):
        return "*bf16"
    is_pointer = argument.endswith(("_ptr", "_mean", "_deviation", "_variance"))
    return "*fp32" if is_pointer else "i32"


def compiled(kernel: Kernel, arch: str) -> Any:
    target = GPUTarget("hip", "gfx942", 64) if arch == "hip" else GPUTarget("cuda", int(arch), 32)
    names = list(kernel.types)
    aligned = [name for name, kind in kernel.types.items() if kind.startswith("*") or name.endswith(("_ss", "_sh"))]
    source = ASTSource(
        kernel.function,
        kernel.types,
        {(names.index(name),): value for name, value in kernel.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options=kernel.options)


def main() -> None:
    arch = sys.argv[1]
    for each in kernels(arch):
        print(json.dumps({"kernel": each.name, "shared": compiled(each, arch).metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
