"""`bench model` in two processes that share every forward, over gloo on a CPU."""

from pathlib import Path

import pytest
import torch

from rectified_spaattn.lab.bench.processes import slowest
from rectified_spaattn.lab.bench.rows import ForwardRow
from studies.rows import read_rows
from test_ranks import launched, pytestmark  # noqa: F401

BENCH = """
import sys, torch
from ranks import run_forked
from rectified_spaattn import cli

def work(rank):
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            print(end.code)
        return bool(end.code)

results = run_forked(2, work)
print(*(text for _, text in results))
sys.exit(any(code for code, _ in results))
"""


@pytest.mark.slow
def test_the_first_of_two_processes_writes_rows_of_both(tmp_path: Path) -> None:
    words = ["bench", "model", "wan2.1-14b", "hunyuan-video", "--size", "tiny", "--dtype", "float32"]
    words += ["--block-size", "64", "--repeats", "2", "--device", "cpu", "--no-compile", "--sparsity", "0.5"]
    printed = launched("-c", BENCH, *words, "--csv-dir", str(tmp_path))
    assert printed.count("results checked before timing") == 2, printed
    rows, origin = read_rows(tmp_path / "model-forward.csv", ForwardRow)
    assert [(row.model, row.kind) for row in rows] == [
        (model, kind) for model in ("wan2.1-14b", "hunyuan-video") for kind in ("dense", "sparse", "removed")
    ]
    assert origin.device.startswith("2 x ")


def test_one_process_alone_is_the_slowest() -> None:
    assert slowest({"a": [1.0, 2.0]}, torch.device("cpu")) == {"a": [1.0, 2.0]}
