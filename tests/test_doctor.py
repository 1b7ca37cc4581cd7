"""`rectified-spaattn doctor`: what it says is what the backends do, and a wrong backend does not pass."""

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rectified_spaattn import diagnosis
from rectified_spaattn.backends import BACKENDS, Backend, choose
from rectified_spaattn.cli.app import app
from rectified_spaattn.method.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def record(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", *arguments])
    return result.exit_code, json.loads(result.output)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU outside the tests: the kernels are not interpreted, which takes long."""
    monkeypatch.setattr("rectified_spaattn.backends.call._interpreted", lambda: False)


@pytest.mark.usefixtures("no_interpreter")
def test_the_report_names_versions_backends_reasons_and_checks() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert f"| torch                 | {torch.__version__}" in result.output
    assert "the kernels run on a GPU, not on cpu" in result.output
    assert "| float32  | 64       | 128        | no (1) | no (1) | yes   | yes       | torch        |" in result.output
    assert "Right here: torch, reference." in result.output


@pytest.mark.usefixtures("no_interpreter")
def test_json_holds_the_same_as_the_backends_say() -> None:
    code, got = record()
    assert code == 0
    assert got["healthy"] is True
    assert got["facts"]["versions"]["torch"] == torch.__version__
    assert len(got["calls"]) == 3 * 2 * 2
    for each in got["calls"]:
        call = diagnosis.Call(CPU, getattr(torch, each["dtype"]), each["head_dim"], each["block_size"])
        assert each["why_not"] == {name: backend.why_not(call) for name, backend in BACKENDS.items()}
        assert each["auto"] == choose("auto", call)
    ran = {(each["backend"], each["dtype"]) for each in got["checks"]}
    assert ran == {(b, d) for b in ("torch", "reference") for d in ("bfloat16", "float16", "float32")}
    assert all(0 <= each["error"] <= each["allowed"] for each in got["checks"])


@pytest.mark.usefixtures("no_interpreter")
def test_a_wrong_backend_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["torch"]

    def off(*arguments: Any) -> tuple[torch.Tensor, Plan]:
        out, plan = right.run(*arguments)
        return out * 1.05, plan

    monkeypatch.setitem(BACKENDS, "torch", Backend(off, right.why_not))
    code, got = record()
    assert code == 1
    assert got["healthy"] is False
    assert {each["backend"] for each in got["checks"] if each["wrong"]} == {"torch"}
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "WRONG here: torch" in result.output


@pytest.mark.usefixtures("no_interpreter")
def test_a_backend_that_breaks_is_reported_and_the_others_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> tuple[torch.Tensor, Plan]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(BACKENDS, "torch", Backend(broken, BACKENDS["torch"].why_not))
    code, got = record()
    assert code == 1
    told = {each["backend"]: each["wrong"] for each in got["checks"]}
    assert told == {"torch": "RuntimeError: no kernel image is available", "reference": None}


def test_nothing_that_runs_is_not_healthy() -> None:
    assert not diagnosis.healthy([])


def test_interpreted_kernels_are_checked_too() -> None:
    """Where Triton interprets its kernels, as it does in these tests."""
    call = diagnosis.Call(CPU, torch.float32, 64, 64)
    if BACKENDS["triton"].why_not(call) is not None:
        pytest.skip("triton runs on the GPU here, where test_gpu.py checks it")
    checked = diagnosis.check("triton", call)
    assert checked.wrong == ""
    assert checked.error is not None


def test_an_unknown_device_is_refused() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "tpu"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "allowed: auto, cpu or cuda" in result.output


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
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"] is True


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_right() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda", "--json"])
    got = json.loads(result.output)
    assert result.exit_code == 0, got["checks"]
    assert {"triton", "torch", "reference"} <= {each["backend"] for each in got["checks"]}
    assert got["facts"]["driver"]
    assert got["facts"]["compute_capability"]
