"""`evaluate` in several processes: that work together, that meet by accident, that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clip_runs import PROMPTS, evaluate, rows, times
from rectified_spaattn.lab.clips.folder import LOCK, MANIFEST, Folder

pytestmark = pytest.mark.usefixtures("one_thread")


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


# Kills itself where the record of the sixth clip is written but not in its place yet: that is the 16th file, after the
# mark, the manifest, two references, six videos and five records.
KILLED = """
import os, signal, sys
from rectified_spaattn import cli

replace, files = os.replace, []

def replace_or_die(*paths):
    files.append(paths)
    if len(files) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = replace_or_die
sys.argv[0] = "rectified-spaattn"
cli.main()
"""


def test_a_killed_run_goes_on_and_loses_nothing(
    arguments: list[str], finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
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
    out, words = tmp_path / "out", [sys.executable, "-m", "rectified_spaattn", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [*words, "--out", str(out)],
            env=os.environ
            | meeting
            | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    printed = [each.communicate(timeout=3000)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], printed
    assert json.loads((out / MANIFEST).read_text())["processes"] == 2
    assert rows(out) == rows(finished[0])
