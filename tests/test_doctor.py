"""`rectified-spaattn doctor`: what it says is what the backends do, and a wrong backend does not pass."""

import json
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn import SparseConfig
from rectified_spaattn.backends import BACKENDS, Call, choose
from rectified_spaattn.backends.triton import HEAD_DIMS
from rectified_spaattn.cli.app import app
from rectified_spaattn.lab.bench import doctor as bench_doctor
from rectified_spaattn.lab.bench.doctor import check, healthy
from rectified_spaattn.lab.bench.shapes import Shape

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def record(*arguments: str) -> tuple[int, dict[str, Any]]:
    code, output = doctor("--json", *arguments)
    return code, json.loads(output)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU outside the tests: the kernels are not interpreted, which takes long."""
    monkeypatch.setattr("rectified_spaattn.backends.triton.interpreted", lambda: False)


@pytest.mark.usefixtures("no_interpreter")
def test_the_report_names_versions_backends_reasons_and_checks() -> None:
    code, output = doctor()
    assert code == 0, output
    assert re.search(rf"\| torch +\| {re.escape(torch.__version__)} ", output)
    assert "the kernels run on a GPU, not on cpu" in output
    assert "| float32  |       64 | no (1) | no (1) | yes   | yes       | torch        |" in output
    assert "relative error: sparsity 0.8, top_p 0.3, query+slope, content" in " ".join(output.split())
    assert "Right here: torch, reference." in output


@pytest.mark.usefixtures("no_interpreter")
def test_json_holds_the_same_as_the_backends_say_of_the_default_config() -> None:
    code, got = record()
    assert code == 0
    assert got["healthy"] is True
    assert got["versions"]["torch"] == torch.__version__
    assert got["device"]["type"] == "cpu"
    assert SparseConfig.from_dict(got["config"]) == SparseConfig()
    assert len(got["calls"]) == 3 * len(HEAD_DIMS)
    for each in got["calls"]:
        call = Call(CPU, getattr(torch, each["dtype"]), each["head_dim"], each["block_size"])
        assert call.block_size == SparseConfig().block_size
        assert each["why_not"] == {name: backend.why_not(call) for name, backend in BACKENDS.items()}
        assert each["auto"] == choose("auto", call)
    checked = {(each["backend"], each["dtype"]) for each in got["checks"]}
    assert checked == {(b, d) for b in ("torch", "reference") for d in ("bfloat16", "float16", "float32")}
    assert all(0 <= each["error"] <= each["allowed"] for each in got["checks"])


@pytest.mark.usefixtures("no_interpreter")
def test_what_is_checked_can_be_chosen() -> None:
    code, got = record("--preset", "wan2.1-t2v-paper", "--block-size", "64", "--sparsity", "0.7")
    assert code == 0, got["checks"]
    config = SparseConfig.from_dict(got["config"])
    assert config.replace(dense_steps=0, dense_layers=()) == SparseConfig.paper(
        sparsity=0.7, block_size=64, first_frame=True
    )
    assert {each["block_size"] for each in (*got["calls"], *got["checks"])} == {64}


@pytest.mark.usefixtures("no_interpreter")
def test_a_wrong_backend_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["torch"]
    off = right._replace(attend=lambda inputs, prepared: right.attend(inputs, prepared) * 1.05)
    monkeypatch.setitem(BACKENDS, "torch", off)
    code, got = record()
    assert code == 1
    assert got["healthy"] is False
    assert {each["backend"] for each in got["checks"] if each["wrong"]} == {"torch"}
    code, output = doctor()
    assert code == 1
    assert "WRONG here: torch" in output


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("asked", [{"top_p": 0.6}, {"neighbours": True, "order": "tile"}], ids=str)
def test_a_backend_that_ignores_a_setting_is_wrong(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What users run has more settings than sparsity: the choice of blocks is judged by all of them."""
    call, config = Call(CPU, torch.float32, 64, 64), SparseConfig(block_size=64, **asked)
    assert check("torch", call, config).wrong is None
    right = BACKENDS["torch"]

    def plan(inputs: Any) -> Any:
        return right.plan(inputs._replace(config=inputs.config.replace(top_p=0.0, neighbours=False)))

    monkeypatch.setitem(BACKENDS, "torch", right._replace(plan=plan))
    assert "critical blocks a query block; allowed" in check("torch", call, config).wrong


@pytest.mark.usefixtures("no_interpreter")
def test_a_backend_that_breaks_is_reported_and_the_others_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(BACKENDS, "torch", BACKENDS["torch"]._replace(attend=broken))
    code, got = record()
    assert code == 1
    wrong = {each["backend"]: each["wrong"] for each in got["checks"]}
    assert wrong == {"torch": "RuntimeError: no kernel image is available", "reference": None}


def test_nothing_that_runs_is_not_healthy() -> None:
    assert not healthy([])


def test_interpreted_kernels_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton interprets its kernels, as it does in these tests."""
    monkeypatch.setattr(bench_doctor, "SELF_CHECK", Shape(name="self-check", grid=(3, 8, 12), text=10, heads=1))
    call = Call(CPU, torch.float32, 64, 64)
    if BACKENDS["triton"].why_not(call) is not None:
        pytest.skip("triton runs on the GPU here, where test_gpu.py checks it")
    checked = check("triton", call, SparseConfig(block_size=64))
    assert checked.wrong is None
    assert checked.error is not None


def test_an_unknown_device_is_refused() -> None:
    code, output = doctor("--device", "tpu")
    assert code == 2
    assert "allowed: auto, cpu or cuda" in output


def test_it_needs_torch_typer_and_rich_alone() -> None:
    code = """
    import importlib.abc, sys

    REFUSED = {"PIL", "accelerate", "diffusers", "huggingface_hub", "imageio", "jinja2", "matplotlib", "safetensors"}
    REFUSED |= {"torchmetrics", "transformers", "yaml"}

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in REFUSED:
                raise ModuleNotFoundError(f"No module named {name!r}: refused by the test", name=name)

    sys.meta_path.insert(0, Refuse())
    sys.argv = ["rectified-spaattn", "doctor", "--device", "cpu", "--json"]
    from rectified_spaattn.cli import main
    main()
    """
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=here)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["healthy"] is True


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_right() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda", "--json"])
    got = json.loads(result.output)
    assert result.exit_code == 0, got["checks"]
    assert {"triton", "torch", "reference"} <= {each["backend"] for each in got["checks"]}
    assert got["device"]["driver"]
    assert got["device"]["compute_capability"]
