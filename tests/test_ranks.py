"""Several processes that share a model, over gloo on a CPU: `rank_tests.py` and `rank_layer_tests.py` in each, and one
that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rectified_spaattn as rsa
import tiny_models
from ranks import run_forked
from rectified_spaattn.pipelines.state import LayerState

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
]

HERE = Path(__file__).parent


def launched(*words: str, **environment: str) -> str:
    """What a script that forks the processes printed. It has to end well."""
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def in_step(count: int, *options: str, **environment: str) -> None:
    printed = launched(str(HERE / "ranks.py"), str(count), *options, **environment)
    assert printed.count(" passed") == count, printed


def test_two_ranks() -> None:
    in_step(2)


def test_four_ranks() -> None:
    models = "(four_ranks and (hunyuan or cogvideox)) or (uneven and hunyuan-11)"
    in_step(4, "-k", f"{models} or (layer and content and 23) or not_divided or dealt")


@pytest.mark.slow
def test_four_ranks_everything_and_compiled_blocks() -> None:
    in_step(4, RANK_TESTS_SLOW="1")
    in_step(2, RANK_TESTS_SLOW="1")


def forwards_until_killed(rank: int) -> int:
    """Forward after forward; rank 1 ends itself within the first attention of the third."""
    torch.accelerator.device_count = lambda: 1
    torch.set_grad_enabled(False)
    model = tiny_models.wan(16)
    rsa.parallelize(model)
    handle = rsa.enable(model, rsa.SparseConfig(block_size=16))
    attend = LayerState.attend

    def attend_or_die(layer: LayerState, *others: Any) -> torch.Tensor:
        if layer.owner.steps_seen == {0, 1, 2} and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return attend(layer, *others)

    LayerState.attend = attend_or_die  # type: ignore[method-assign]
    for step in range(1000):
        handle.set_step(step)
        model(**tiny_models.wan_inputs(model), return_dict=False)
        print("step", step)
    return 0


def test_the_death_of_one_ends_the_other_with_an_error() -> None:
    (survivor, printed), (victim, _) = run_forked(2, forwards_until_killed)
    assert (survivor, victim) == (1, -signal.SIGKILL), printed
    assert "step 1" in printed
    assert "step 2" not in printed
    assert "Error" in printed, printed
