"""Processes that share a model on a CPU, as torchrun starts them, but forked after everything slow was imported.

python tests/ranks.py 2 [options of pytest]     runs rank_tests.py and rank_layer_tests.py in two processes
"""

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import PartialState

import model_cases
import rectified_spaattn.pipelines.teacache
import tensors

IMPORTED = (torch, diffusers, tensors, model_cases, rectified_spaattn.pipelines.teacache)
HERE = Path(__file__).parent


def run_forked(count: int, work: Callable[[int], int]) -> list[tuple[int, str]]:
    """Calls work(rank) in `count` processes. Of each the exit code, or minus the signal, and the output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(count)]
        children = [_forked(rank, group, work, output) for rank, output in enumerate(outputs)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


def _forked(rank: int, group: dict[str, str], work: Callable[[int], int], output: Path) -> int:
    """The process that works, which does not come back from here."""
    child = os.fork()
    if child:
        return child
    os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    file = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  where pytest captures them
    code = 1
    try:
        torch.set_num_threads(1)
        PartialState._reset_state()  # of the process that this one comes from
        code = work(rank)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def in_step(rank: int) -> int:
    options = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "rank_group", *sys.argv[2:]]
    return int(pytest.main([*options, *(str(HERE / file) for file in ("rank_tests.py", "rank_layer_tests.py"))]))


if __name__ == "__main__":
    results = run_forked(int(sys.argv[1]), in_step)
    for rank, (code, output) in enumerate(results):
        print(f"rank {rank}: exit code {code}\n{output}")
    sys.exit(any(code for code, _ in results))
