"""`generate --prompts`: one clip a prompt, shared between processes, and gone on with."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from clip_runs import WAN, generate, told
from ranks import run_forked
from rectified_spaattn.cli import generate as cli_generate

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a b", "c d", "e/f")
SETTINGS = [word for word in WAN if word not in ("--prompt", "a b c")]


@pytest.fixture
def words(models: Path, tmp_path: Path) -> list[Any]:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return [models / "wan", *SETTINGS, "--config", models / "sparse.yaml", "--prompts", file, "--out", tmp_path / "out"]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-0.*")}


def test_one_clip_a_prompt_and_only_what_is_missing(words: list[Any], tmp_path: Path) -> None:
    first = generate(*words)
    assert first.exit_code == 0, first.output
    out = tmp_path / "out"
    made = times(out)
    clips = sorted(name for name in made if name.endswith(".mp4"))
    assert clips[:2] == ["a b-0.mp4", "c d-0.mp4"]
    assert clips[2].startswith("e f~")
    assert told(out / "c d-0.mp4")["request"]["prompt"] == "c d"

    again = generate(*words)
    assert again.exit_code == 0
    assert "3 of 3 clips of this process are there already" in again.output
    assert times(out) == made

    (out / "c d-0.json").unlink()  # as where a run was killed after the clip
    (out / "a b-0.mp4").unlink()
    third = generate(*words)
    assert third.exit_code == 0, third.output
    assert "1 of 3 clips" in third.output
    changed = {name for name, time in times(out).items() if time != made[name]}
    assert changed == {"a b-0.mp4", "a b-0.json", "c d-0.mp4", "c d-0.json"}

    other = generate(*words, "--sparsity", "0.5")
    assert other.exit_code == 1
    assert "there already" in other.output


def test_what_does_not_go_together(words: list[Any], tmp_path: Path) -> None:
    both = generate(*words, "--prompt", "a")
    assert both.exit_code == 2
    assert "allowed: one of the two" in both.output
    assert generate(*words[:-2]).exit_code == 2  # without --out
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    foreign = generate(*words)
    assert foreign.exit_code == 1
    assert "files that are not of this command" in foreign.output


def test_the_death_of_a_process_leaves_what_the_others_made(words: list[Any], tmp_path: Path) -> None:
    def work(rank: int) -> int:
        if rank == 1:  # dies where its clip is written and its JSON is not
            cli_generate.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        result = generate(*words)
        print(result.output)
        return result.exit_code

    (survivor, printed), (victim, _) = run_forked(2, work)
    assert (survivor, victim) == (1, -signal.SIGKILL), printed
    assert "Connection closed" in printed or "Error" in printed
    made = times(tmp_path / "out")
    assert {"a b-0.mp4", "a b-0.json"} <= set(made)
    again = generate(*words)
    assert again.exit_code == 0, again.output
    now = times(tmp_path / "out")
    assert len(now) == 6
    assert {name for name, time in made.items() if now[name] == time} >= {"a b-0.mp4", "a b-0.json"}
