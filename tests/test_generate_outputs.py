"""`rectified-spaattn generate`: what it made is there at the end, whatever became of its words and files."""

from pathlib import Path
from typing import Any

import pytest

from clip_runs import WAN, generate, told
from rectified_spaattn.cli import generate as making

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_clip_is_there_where_nobody_reads_what_is_said_of_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the output is piped into `head`, or into a file on a full disk."""

    def gone(*words: Any, **more: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    run = making.generate

    def generate_once(*arguments: Any, **more: Any) -> Any:
        clips = run(*arguments, **more)
        monkeypatch.setattr("rich.console.Console.print", gone)
        return clips

    monkeypatch.setattr(making, "generate", generate_once)
    out = tmp_path / "v.mp4"
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", out)
    assert result.exit_code == 1
    assert out.stat().st_size
    assert told(out)["stats"]["sparse_calls"]


def test_a_file_that_another_run_made_meanwhile_stays(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = making.generate, tmp_path / "v.mp4"

    def generate_slowly(*arguments: Any, **more: Any) -> Any:
        out.write_text("of another run")
        return run(*arguments, **more)

    monkeypatch.setattr(making, "generate", generate_slowly)
    result = generate(models / "wan", *WAN, "--config", models / "sparse.yaml", "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_text() == "of another run"
    assert told(tmp_path / "v-2.mp4")["output"]["file"] == "v-2.mp4"
    assert "Note: somebody else made" in result.output
