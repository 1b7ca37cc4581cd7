"""What tests that processes run in step share, as a plugin: pytest -p rank_group tests/rank_tests.py"""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist

import rectified_spaattn as rsa
import tiny_models
from model_cases import CASES, build

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GPU = torch.cuda.is_available()
if COUNT == 1:
    pytest.skip("several processes: make gpu2-test, or test_ranks.py", allow_module_level=True)
if GPU and torch.cuda.device_count() < COUNT:
    pytest.skip(f"got {torch.cuda.device_count()} GPUs for {COUNT} processes", allow_module_level=True)
BLOCK = 128 if GPU else 16
PLAIN = {"block_size": BLOCK, "top_p": 0.0, "sparsity": 0.7}
CONTENT = rsa.SparseConfig(**PLAIN)
PAPER = rsa.SparseConfig.paper(**PLAIN)
REFUSED = "HunyuanVideo I2V, token replaced"
UNEVEN = "HunyuanVideo 1.5"  # 15 text tokens


@pytest.fixture(scope="session", autouse=True)
def group() -> Iterator[None]:
    """The processes, without gradients. On a CPU diffusers divides by a number of devices that is 0."""
    diffusers.utils.logging.set_verbosity_error()
    patch = pytest.MonkeyPatch()
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patch.setattr(tiny_models, "VIDEO", (4, 16, 32))
        patch.setattr(tiny_models, "IMAGE", (1, 32, 64))
    else:
        torch.set_num_threads(1)
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
    dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(seconds=120))
    with torch.no_grad():
        yield
    patch.undo()
    dist.destroy_process_group()


def moved(value: Any) -> Any:
    if not GPU:
        return value
    if isinstance(value, tuple):  # cosines and sines, or several of them: as they are, in float32
        return tuple(each.to("cuda") if isinstance(each, torch.Tensor) else moved(each) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)


def made(name: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = build(name, CASES[name].head_dims[-1 if GPU else 0])
    if name.startswith("LTX-2"):
        inputs["timestep"] = inputs["timestep"][:, 0]  # as its pipeline passes it
    return moved_model(model), {key: moved(value) for key, value in inputs.items()}


def moved_model(model: Any) -> Any:
    return model.to("cuda", torch.bfloat16) if GPU else model


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out = model(**inputs, return_dict=False)
    both: torch.Tensor = torch.cat([each.flatten().float() for each in out])  # LTX-2 gives audio, too
    return both


def sparse(model: Any, inputs: dict[str, Any], config: rsa.SparseConfig, backend: str = "auto") -> torch.Tensor:
    with rsa.enable(model, config, backend=backend) as handle:
        out = forward(model, inputs)
        assert handle.stats().sparse_calls > 0
    return out


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_same(cut: torch.Tensor, alone: torch.Tensor, noise: float, dense: torch.Tensor) -> None:
    """On a CPU but for rounding: bit for bit, unless products of odd parts round otherwise. On a GPU products of any
    parts do, which turns the choice of some blocks: within the noise of the dense model's own parallel run, or well
    below what sparsity itself changes. `test_a_layer` is stricter there.
    """
    assert apart(cut, alone) <= (max(4 * noise, 0.3 * apart(alone, dense)) if GPU else 1e-6)


def on_all_ranks(error: type[Exception], match: str, call: Callable[[], object]) -> None:
    """All of them are refused, and say so."""
    with pytest.raises(error, match=match):
        call()
    told: list[Any] = [None] * COUNT
    dist.all_gather_object(told, RANK)
    assert told == list(range(COUNT))
