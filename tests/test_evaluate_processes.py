"""`evaluate` in several processes: that work together, that meet by accident, that are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clip_runs import PROMPTS, evaluate, rows, times
from ranks import run_forked
from rectified_spaattn.lab.clips.folder import LOCK, MANIFEST, Folder

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


# Holds the lock of a folder until it is told to go.
HOLDER = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_run_works_in_is_refused_until_that_one_is_dead(arguments: list[str], copy: Path) -> None:
    before = times(copy, "**/*")
    words = [sys.executable, "-c", HOLDER, str(copy / LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        result = evaluate(arguments, copy)
        assert result.exit_code == 1
        assert "another run is at work in this folder" in result.output
        assert times(copy, "**/*") == before
        other.kill()
    settings = json.loads((copy / MANIFEST).read_text())["settings"]
    with Folder(copy, list(PROMPTS), settings).claim("evaluate", {}):
        pass


def evaluate_until_killed(arguments: list[str], out: Path) -> int:
    """Dies where the record of the sixth clip is written but not in its place yet: that is the 16th file, after the
    mark, the manifest, two references, six videos and five records.
    """
    replace, files = os.replace, []

    def replace_or_die(*paths: Any) -> None:
        files.append(paths)
        if len(files) == 16:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    return evaluate(arguments, out).exit_code


def test_a_killed_run_goes_on_and_loses_nothing(
    arguments: list[str], finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    [(code, printed)] = run_forked(1, lambda rank: evaluate_until_killed(arguments, out))
    assert code == -signal.SIGKILL, printed
    before = times(out, "clips/*/[0-9]*.json")
    assert len(before) == 5
    assert len(list(out.rglob(".partial-*"))) == 1
    assert len(list(out.glob("references/*.safetensors"))) == 1  # of the second pair; the first is done
    assert not (out / "clips.csv").exists()
    result = evaluate(arguments, out)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert rows(out) == rows(finished[0])
    assert rows(out, "summary.csv") == rows(finished[0], "summary.csv")
    assert not list(out.rglob(".partial-*")) + list(out.rglob("*.safetensors"))


def test_two_processes_give_the_same_table(arguments: list[str], finished: tuple[Path, str], tmp_path: Path) -> None:
    """As torchrun and accelerate start them, without the launcher."""
    out = tmp_path / "out"

    def work(rank: int) -> int:
        result = evaluate(arguments, out)
        print(result.output)
        return result.exit_code

    both = run_forked(2, work)
    assert [code for code, _ in both] == [0, 0], both
    assert json.loads((out / MANIFEST).read_text())["processes"] == 2
    assert rows(out) == rows(finished[0])
