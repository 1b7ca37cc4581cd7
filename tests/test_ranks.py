"""Several processes that share a model, over gloo on a CPU: `rank_tests.py` in each of them, and one that is killed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

HERE = Path(__file__).parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist")


def started(words: list[str], count: int, **environment: str) -> list["subprocess.Popen[str]"]:
    """The processes as torchrun starts them, without the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    return [
        subprocess.Popen(
            words,
            env=os.environ
            | meeting
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            | {"PYTHONPATH": paths}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def in_step(count: int, *options: str, **environment: str) -> None:
    processes = started([*PYTEST, *options, str(HERE / "rank_tests.py")], count, **environment)
    printed = [each.communicate(timeout=1500)[0] for each in processes]
    assert [each.returncode for each in processes] == [0] * count, "\n".join(printed)
    assert " passed" in printed[0]


def test_two_ranks() -> None:
    in_step(2)


def test_four_ranks() -> None:
    in_step(4, "-k", "four_heads or uneven or places or refused or statistics")


@pytest.mark.slow
def test_four_ranks_everything_and_compiled_blocks() -> None:
    in_step(4, RANK_TESTS_SLOW="1")
    in_step(2, "-k", "compiled", RANK_TESTS_SLOW="1")


# Forward after forward; rank 1 ends itself within the first attention of the third.
KILLED = """
import os, signal, sys, torch
import rectified_spaattn as rsa, tiny_models
from rectified_spaattn.pipelines.state import LayerState

torch.accelerator.device_count = lambda: 1
torch.set_grad_enabled(False)
model = tiny_models.wan(16)
handle = rsa.enable(model, rsa.SparseConfig(block_size=16))
rsa.parallelize(model)
attend = LayerState.attend

def attend_or_die(layer, *others):
    if layer.owner.count == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return attend(layer, *others)

LayerState.attend = attend_or_die
for step in range(1000):
    handle.set_step(step)
    model(**tiny_models.wan_inputs(model))
    print("step", step, flush=True)
"""


def test_the_death_of_one_ends_the_others_with_an_error() -> None:
    survivor, victim = started([sys.executable, "-c", KILLED], 2)
    printed = survivor.communicate(timeout=120)[0]
    victim.wait(timeout=120)
    assert victim.returncode == -signal.SIGKILL, victim.communicate()[0]
    assert survivor.returncode == 1
    assert "step 1\n" in printed
    assert "step 2\n" not in printed
    assert "RuntimeError" in printed or "DistNetworkError" in printed, printed
