"""Compiles kernels without a GPU: `python compile_kernels.py 90 hip` (compute capabilities, 90-every, or AMD's).

Prints a JSON line a kernel: architecture, name, and the shared memory that it needs. For Hopper translates each once
more with integers that are 1: 90 with all at once, 90-every with each alone. A process of its own, because Triton's
interpreter, which the tests use, replaces the compiler for good.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from math import gcd
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from rectified_spaattn.backends.triton import columns_of
from rectified_spaattn.backends.triton.arrange import _cut_kernel, _halve_kernel, _project_kernel, cut_warps
from rectified_spaattn.backends.triton.attend import _attend_kernel, tiling_of
from rectified_spaattn.backends.triton.directions import _directions_kernel, _moments_kernel, rows_of
from rectified_spaattn.backends.triton.directions import tiling_of as tiling_of_directions
from rectified_spaattn.backends.triton.eight_bits import _listed_kernel, _quantise_kernel, most
from rectified_spaattn.backends.triton.eight_bits import tiling_of as tiling_in_8_bits
from rectified_spaattn.backends.triton.plan import _compensate_kernel, _scores_kernel
from rectified_spaattn.backends.triton.queries import _told_kernel
from rectified_spaattn.backends.triton.select import _leaders_kernel, _narrow_kernel, _select_kernel, _turns_kernel
from rectified_spaattn.backends.triton.slope import _mass_kernel, _slope_kernel
from rectified_spaattn.backends.triton.tile import _tile_kernel
from rectified_spaattn.method.residual import sampled_rows

SELECT_FLAGS = ("TOP_P", "NEIGHBOURS", "FIRST_FRAME", "COMPENSATE", "GAIN", "TAIL", "RESIDUAL", "IDLE")
TAILS = ((False, False), (True, False), (True, True))  # tail, slope
RANK = 8  # of the directions in which errors are told


class Kernel(NamedTuple):
    name: str
    function: Any
    types: dict[str, str]  # of all arguments in order, "constexpr" for those in constants
    constants: dict[str, Any]
    options: dict[str, Any]


def kernels(arch: str) -> Iterator[Kernel]:
    """What is compiled for an architecture, in bfloat16; every one at its largest, with a tail and a slope.

    90, hip   every kernel once
    90-every  every kernel at every shape and with every flag
    others    what multiplies on tensor cores, which every generation does in its own way: to NVIDIA's the other kernels
              are the same instructions and the same shared memory
    256       a head of 256 on the others and 90-every: tiles are twice as large, and where they fit follows the
              architecture

    A partial result is taken up (RESUME) after 8 bits and, on 90, FlashAttention-4.
    """
    if arch == "90-every":
        yield from every_variant()
        return
    yield attend_kernel(arch, 128, 128, False, *TAILS[-1])
    yield scores_kernel(128, True, True, RANK)
    yield compensate_kernel(128)
    yield told_kernel(128)
    yield slope_kernel(128, 128)
    yield tile_kernel(128, 128, True, True, RANK)
    yield moments_kernel(128, 2)
    yield directions_kernel(arch, 128, arch != "90")  # that of both is slow to compile: every_variant has it
    yield project_kernel(128)
    if arch != "hip":
        yield attend_kernel(arch, 128, 128, True, *TAILS[-1])
        for values in (False, True) if arch != "80" else (False,):  # which has no 8-bit floats
            yield listed_kernel(arch, 128, 128, values)
            yield quantise_kernel(values)
    if arch == "90":
        yield from with_the_fewest_flags()
    else:
        yield from of_wide_heads(arch)
    if arch in ("90", "hip"):
        yield halve_kernel(8192, 16)
        yield cut_kernel(arch, 16384, 1)
        yield cut_kernel(arch, 4096, 2)
        yield kernel("turns", _turns_kernel, {"BLOCK": 64})
        yield select_kernel(8192, False, *SELECT_FLAGS)
        yield leaders_kernel(8192)
        yield narrow_kernel(8192)
        yield mass_kernel()
    if arch == "hip":
        yield directions_kernel(arch, 256, True)


def with_the_fewest_flags() -> Iterator[Kernel]:
    """And at the smallest shape: what a flag leaves out must not be needed elsewhere."""
    yield attend_kernel("90", 64, 64, False, *TAILS[0])
    yield scores_kernel(64, False, False)
    yield tile_kernel(64, 64, False, False)
    yield select_kernel(64, False)


def of_wide_heads(arch: str) -> Iterator[Kernel]:
    yield attend_kernel(arch, 128, 256, False, *TAILS[-1])
    yield told_kernel(256)
    yield compensate_kernel(256)
    yield slope_kernel(128, 256)
    yield tile_kernel(128, 256, True, True, RANK)
    yield project_kernel(256)


def every_variant() -> Iterator[Kernel]:
    flags = tuple(product((True, False), repeat=2))  # gain, tail
    for number, (block, head_dim) in enumerate(((128, 128), (64, 128), (128, 64), (64, 64))):
        # a head of 64 with a tail alone has less of everything than one with a slope, too
        tails = TAILS if head_dim == 128 else (TAILS[0], TAILS[-1])
        for resume, (tail, slope) in product((False, True) if block == 128 else (False,), tails):
            yield attend_kernel("90", block, head_dim, resume, tail, slope)
        yield slope_kernel(block, head_dim)
        yield tile_kernel(block, head_dim, False, True, RANK)
        for gain, tail in flags if number == 0 else flags[:1]:
            yield tile_kernel(block, head_dim, gain, tail)
    for head_dim in (128, 64):
        for gain, tail in flags if head_dim == 128 else flags[:1]:
            yield scores_kernel(head_dim, gain, tail)
        yield scores_kernel(head_dim, False, True, RANK)
        yield compensate_kernel(head_dim)
        yield told_kernel(head_dim)
        yield project_kernel(head_dim)
    yield attend_kernel("90", 128, 96, False, *TAILS[-1])
    yield attend_kernel("90", 128, 96, True, *TAILS[-1])
    yield attend_kernel("90", 64, 256, False, *TAILS[-1])
    yield tile_kernel(128, 96, True, True, RANK)  # all else is of as many columns as heads of 128
    yield from of_wide_heads("90")
    yield moments_kernel(96, 1)
    yield directions_kernel("90", 64, False)
    yield directions_kernel("90", 128, True)  # of 64: smaller tiles of the same, and slow to compile
    yield halve_kernel(8192, 16)
    yield cut_kernel("90", 16384, 1)
    yield cut_kernel("90", 4096, 2)
    yield kernel("turns", _turns_kernel, {"BLOCK": 64})
    yield select_kernel(8192, False, *SELECT_FLAGS)
    yield select_kernel(8192, True, *SELECT_FLAGS)
    yield leaders_kernel(8192)
    yield leaders_kernel(64)
    yield narrow_kernel(8192)
    yield mass_kernel()
    yield select_kernel(64, False)
    yield select_kernel(64, False, "COMPENSATE")
    yield select_kernel(64, False, "COMPENSATE", "TAIL", "TOP_P")


def tile_kernel(block: int, head_dim: int, gain: bool, tail: bool, rank: int = 0) -> Kernel:
    constants = {"BLOCK": block, "HEAD_DIM": head_dim, "GAIN": gain, "TAIL": tail, "q_sd": 1, "k_sd": 1, "v_sd": 1}
    constants |= {"COLUMNS": columns_of(head_dim), "RANK": rank, "WIDTH": 16}
    name = f"tile {block}x{head_dim} gain={gain} tail={tail} rank={rank}"
    return kernel(name, _tile_kernel, constants, num_warps=4 if head_dim <= 128 else 8)


def scores_kernel(head_dim: int, gain: bool, tail: bool, rank: int = 0) -> Kernel:
    constants = {"HEAD_DIM": head_dim, "BLOCK": 64, "CHUNK": 32, "GAIN": gain, "TAIL": tail, "RESPONSE": rank**2}
    return kernel(f"scores {head_dim} gain={gain} tail={tail} rank={rank}", _scores_kernel, constants)


def leaders_kernel(width: int) -> Kernel:
    return kernel(f"leaders {width}", _leaders_kernel, {"WIDTH": width}, num_warps=min(max(width // 512, 1), 16))


def narrow_kernel(width: int) -> Kernel:
    constants = {"WIDTH": width, "KNOWN": 3}
    return kernel(f"narrow {width}", _narrow_kernel, constants, num_warps=min(max(width // 512, 1), 16))


def mass_kernel() -> Kernel:
    return kernel("mass", _mass_kernel, {"BLOCK": 64})


def slope_kernel(block: int, head_dim: int) -> Kernel:
    columns = columns_of(head_dim)
    constants = {"WIDTH": 1024, "BLOCK": block, "ROWS": 32 if columns > 128 else 64}
    constants |= {"HEAD_DIM": head_dim, "COLUMNS": columns, "AT_ONCE": min(columns, 128)}
    return kernel(f"slope {block}x{head_dim}", _slope_kernel, constants, num_warps=8)


def compensate_kernel(head_dim: int) -> Kernel:
    constants = {"HEAD_DIM": head_dim, "COLUMNS": columns_of(head_dim), "BLOCK": 64, "BLOCK_K": 16}
    return kernel(f"compensate {head_dim}", _compensate_kernel, constants)


def told_kernel(head_dim: int) -> Kernel:
    columns, rows = columns_of(head_dim), sampled_rows(128)
    constants = {"STEP": rows.step, "SAMPLED": len(rows), "HEAD_DIM": head_dim, "COLUMNS": columns}
    constants |= {"BLOCK_M": 64, "BLOCK_N": 64 if columns <= 128 else 32}
    return kernel(f"told {head_dim}", _told_kernel, constants, num_warps=4, num_stages=2)


def project_kernel(head_dim: int) -> Kernel:
    constants = {"HEAD_DIM": head_dim, "COLUMNS": columns_of(head_dim), "BLOCK": 64, "WIDTH": 16, "q_sd": 1, "k_sd": 1}
    return kernel(f"project {head_dim}", _project_kernel, constants)


def moments_kernel(head_dim: int, group: int) -> Kernel:
    constants = {"HEAD_DIM": head_dim, "TILE": 32, "CHUNK": 64, "GROUP": group, "q_sd": 1, "k_sd": 1}
    return kernel(f"moments {head_dim} group={group}", _moments_kernel, constants)


def directions_kernel(arch: str, head_dim: int, both: bool) -> Kernel:
    """both: of queries and keys together, as sorting needs them."""
    dim = head_dim * (2 if both else 1)
    constants = {"RANK": RANK, "WIDTH": 16, "DIM": dim, "HEAD_DIM": head_dim, "COLUMNS": rows_of(dim), "ROUNDS": 10}
    tiling = tiling_of_directions(arch, dim)
    constants |= {"BOTH": both, "CHUNK": tiling.chunk}
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return kernel(f"directions {dim} both={both}", _directions_kernel, constants, **options)


def halve_kernel(chunk: int, warps: int) -> Kernel:
    constants = {"FIRST": chunk == 8192, "RANK": 8, "SAMPLE": 64, "CHUNK": chunk}
    return kernel(f"halve {chunk}", _halve_kernel, constants, num_warps=warps)


def cut_kernel(arch: str, tokens: int, levels: int) -> Kernel:
    constants = {"FIRST": False, "LAST": tokens == 4096, "LEVELS": levels, "TOKENS": tokens, "RANK": RANK, "SAMPLE": 64}
    return kernel(f"cut {tokens}", _cut_kernel, constants, num_warps=cut_warps(tokens, 64 if arch == "hip" else 32))


def select_kernel(width: int, given: bool, *flags: str) -> Kernel:
    constants = {"WIDTH": width, "GIVEN": given, **{flag: flag in flags for flag in SELECT_FLAGS}}
    name = " ".join(("select", str(width), f"given={given}", *flags))
    return kernel(name, _select_kernel, constants, num_warps=min(max(width // 512, 1), 16))


def attend_kernel(arch: str, block: int, head_dim: int, resume: bool, tail: bool, slope: bool) -> Kernel:
    """With a slope every query has a half variance of its own, too, as in the default."""
    tiling = tiling_of(arch, block, head_dim, resume, own=slope)
    constants = {"BLOCK": block, "HEAD_DIM": head_dim, "RESUME": resume, "TAIL": tail, "SLOPE": slope, "OWN": slope}
    constants |= {"COLUMNS": columns_of(head_dim), "PART": gcd(tiling.block_n, head_dim)}
    constants |= {"TURNS": slope and not resume, "LISTED": not resume}
    constants |= {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "TAIL_STAGES": tiling.tail_stages}
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if tiling.maxnreg is not None:
        options["maxnreg"] = tiling.maxnreg
    return kernel(
        f"attend {block}x{head_dim} resume={resume} tail={tail} slope={slope}",
        _attend_kernel,
        constants,
        **options,
    )


def listed_kernel(arch: str, block: int, head_dim: int, values: bool) -> Kernel:
    """values: whether they are in 8 bits, too."""
    tiling = tiling_in_8_bits(arch, block, head_dim)
    constants = {"BLOCK": block, "HEAD_DIM": head_dim, "COLUMNS": columns_of(head_dim), "WIDEN": False, "ROOM": 8}
    constants |= {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "VALUES": values}
    constants["MOST"] = most(values)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return kernel(f"listed {block}x{head_dim} values={values}", _listed_kernel, constants, **options)


def quantise_kernel(values: bool) -> Kernel:
    constants = {"BLOCK": 128, "HEAD_DIM": 128, "COLUMNS": 128}
    constants |= {"MOST": most(values), "VALUES": values, "AS_OPERAND": values}
    return kernel(f"quantise values={values}", _quantise_kernel, constants)


def kernel(name: str, function: Any, constants: dict[str, Any], **options: Any) -> Kernel:
    types = {
        argument: "constexpr" if argument in constants else type_of(argument, function.__name__, constants)
        for argument in function.arg_names
    }
    return Kernel(name, function, types, constants, options)


def type_of(argument: str, kernel: str, constants: dict[str, Any]) -> str:
    x = "bf16"
    if kernel == "_listed_kernel" and argument in ("k_desc", "v_desc"):
        rows, columns = constants["BLOCK_N"], constants["COLUMNS"]
        if argument == "k_desc":
            return f"tensordesc<{'fp8e4nv' if constants['VALUES'] else 'i8'}[{rows},{columns}]>"
        return f"tensordesc<{f'fp8e4nv[{columns},{rows}]' if constants['VALUES'] else f'{x}[{rows},{columns}]'}>"
    if argument in ("k8_ptr", "v8_ptr"):
        return "*fp8e4nv" if constants["VALUES"] else "*i8"
    if argument.endswith("_desc"):
        rows = constants["BLOCK_M" if argument.startswith("q_") else "PART" if argument == "slope_desc" else "BLOCK_N"]
        columns = constants["PART" if argument == "q_part_desc" else "COLUMNS"]
        return f"tensordesc<{x}[{rows},{columns}]>"
    if argument in ("scale", "scale_2", "log_b", "tail_log_b", "top_p", "cap"):
        return "fp32"
    model_strides = kernel in ("_tile_kernel", "_project_kernel", "_moments_kernel") and argument[1:3] == "_s"
    if argument.endswith(("_sb", "_ss", "_sh", "_sd", "_st")):
        return "i64" if model_strides or argument.endswith("_sb") else "i32"
    if kernel in ("_project_kernel", "_moments_kernel", "_halve_kernel") and argument == "places_ptr":
        return "*i64"
    if argument in ("tiled_ptr", "budget_ptr"):
        return "*i64"
    if argument in (
        "room_ptr" if kernel == "_cut_kernel" else "from_ptr",
        "from_ptr",
        "digits_ptr",
        "to_ptr",
        "order_ptr",
        "count_ptr",
        "index_ptr",
        "end_ptr",
        "places_ptr",
        "turn_ptr",
        "top_k_ptr",
    ):
        return "*i32"
    if argument in (
        "critical_ptr",
        "compensated_ptr",
        "neighbours_ptr",
        "first_frame_ptr",
        "worth_ptr",
        "valid_ptr",
        "idle_ptr",
    ):
        return "*i1"
    in_model_dtype = {
        "_tile_kernel": (
            *("q_ptr", "k_ptr", "v_ptr", "q_out", "k_out", "v_out", "k_tail", "v_tail", "k_pool", "v_pool"),
            *("to_q_ptr", "to_k_ptr"),
        ),
        "_scores_kernel": ("tail_ptr",),
        "_told_kernel": ("q_ptr", "tail_ptr"),
        "_project_kernel": ("q_ptr", "k_ptr", "w_ptr"),
        "_moments_kernel": ("q_ptr", "k_ptr"),
        "_directions_kernel": ("first_ptr",) if constants.get("BOTH") else ("first_ptr", "second_ptr"),
        "_attend_kernel": ("out_ptr", "partial_ptr"),
        "_slope_kernel": ("k_ptr", "v_ptr"),
        "_quantise_kernel": ("k_ptr", "v_ptr"),
        "_listed_kernel": ("out_ptr",),
    }.get(kernel, ())
    if argument in in_model_dtype:
        return f"*{x}"
    halves = {
        "_tile_kernel": ("_mean", "_deviation", "_variance", "_response"),
        "_scores_kernel": ("q_ptr", "k_ptr", "k_var_ptr", "response_ptr"),
        "_slope_kernel": ("_mean_ptr",),
        "_compensate_kernel": ("v_ptr",),
        "_project_kernel": ("out_ptr",),
        "_halve_kernel": ("features_ptr",),
        "_cut_kernel": ("features_ptr",),
        "_moments_kernel": ("covariance_ptr", "weigh_ptr"),
        "_directions_kernel": ("covariance_ptr", "weigh_ptr"),
    }
    if argument.endswith(halves.get(kernel, ("nothing",))):
        return "*bf16"
    is_pointer = argument.endswith(("_ptr", "_mean", "_deviation", "_variance"))
    return "*fp32" if is_pointer else "i32"


def source_of(kernel: Kernel) -> ASTSource:
    names = list(kernel.types)
    ends = ("_ss", "_sh", "half")
    aligned = [name for name, kind in kernel.types.items() if kind.startswith("*") or name.endswith(ends)]
    return ASTSource(
        kernel.function,
        kernel.types,
        {(names.index(name),): value for name, value in kernel.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in kernel.constants},
    )


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", "gfx942", 64) if arch == "hip" else GPUTarget("cuda", int(arch.split("-")[0]), 32)


def translate(kernel: Kernel, arch: str) -> None:
    """The first step of compiling, in a tenth of the time: there it fails where a number is not what it must be."""
    target, context = target_of(arch), ir.context()
    backend = make_backend(target)
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(kernel.options))
    functions = backend.get_codegen_implementation(options)
    source_of(kernel).make_ir(target, options, functions, backend.get_module_map(), context)


def with_ones(kernel: Kernel, names: list[str]) -> Kernel:
    """As a GPU gets it for such a call, of one head for example: Triton makes constants of integers that are 1, and its
    interpreter does not. Constants have no methods.
    """
    types = kernel.types | dict.fromkeys(names, "constexpr")
    return kernel._replace(types=types, constants=kernel.constants | dict.fromkeys(names, 1))


def main() -> None:
    for arch in sys.argv[1:]:
        for each in kernels(arch):
            shared = triton.compile(source_of(each), target=target_of(arch), options=each.options).metadata.shared
            print(json.dumps({"arch": arch, "kernel": each.name, "shared": shared}), flush=True)
            # `half` is how many elements a tensor has: never 1
            integers = [name for name, kind in each.types.items() if kind in ("i32", "i64") and name != "half"]
            for ones in {"90": [integers], "90-every": [[name] for name in integers]}.get(arch, []):
                translate(with_ones(each, ones), arch)


if __name__ == "__main__":
    main()
