"""Every kernel compiles for every architecture without a GPU, and fits its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_KIB = {"80": 163, "89": 99, "90": 227, "90-every": 227, "100": 227, "120": 99, "hip": 64}
TENSOR_CORES = {"attend", "scores", "compensate", "project", "slope", "tile", "moments", "directions", "told"}
EIGHT_BITS = {"listed", "quantise"}
EVERY = TENSOR_CORES | {"halve", "cut", "turns", "leaders", "narrow", "select", "mass"}
OF_ARCH = dict.fromkeys(SHARED_KIB, TENSOR_CORES | EIGHT_BITS) | {
    "90": EVERY | EIGHT_BITS,
    "90-every": EVERY,
    "hip": EVERY,
}
OTHERS = (("90-every",), ("80", "100"), ("89", "120", "hip"))
LEAST = min(SHARED_KIB[arch] for arch in SHARED_KIB if arch != "hip")


@pytest.mark.parametrize(
    "arches", [("90",), *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)], ids=" ".join
)
def test_kernels_compile_and_fit(arches: tuple[str, ...], tmp_path: Path) -> None:
    """compile_kernels.py says what is compiled for which architecture. Importing takes seconds: two processes."""
    # not the interpreter, and no kernel that an earlier run has compiled
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, SCRIPT, *arches], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for arch in arches:
        assert {each["kernel"].split()[0] for each in kernels if each["arch"] == arch} == OF_ARCH[arch]
    for each in kernels:
        alike = (
            each["arch"].startswith("90") and each["kernel"].split()[0] not in TENSOR_CORES | EIGHT_BITS
        )  # on every NVIDIA GPU
        assert each["shared"] <= (LEAST if alike else SHARED_KIB[each["arch"]]) * 1024, each


@pytest.mark.slow
def test_gluon_compiles_for_hopper_and_products_do_not_wait_one_by_one(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    script = SCRIPT.with_name("compile_gluon.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert [each["kernel"] for each in kernels] == ["attend"] * 3 + ["listed"] * 2
    for each in kernels:
        assert each["shared"] <= SHARED_KIB["90"] * 1024
        assert 0 < each["waits"] < each["products"] / 3, each
