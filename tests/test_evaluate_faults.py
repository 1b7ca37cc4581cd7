"""`evaluate` and `demo` where files are damaged, disks full, processes killed, and folders somebody else's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clip_runs import MODES, PROMPTS, command, evaluate, rows, times
from rectified_spaattn.lab.clips.clip import Clip, Pair, full_mode
from rectified_spaattn.lab.clips.folder import MANIFEST, MARK, Folder
from rectified_spaattn.lab.clips.options import ClipError
from rectified_spaattn.lab.clips.summary import measure
from rectified_spaattn.lab.rows import write_atomically

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")

FIRST = Pair(prompt=PROMPTS[0], seed=0)


def record_of(folder: Path, mode: str = "row-50") -> Path:
    return folder / "clips" / mode / "0000-seed0.json"


def video_of(folder: Path, mode: str = "row-50") -> Path:
    return folder / "videos" / mode / f"{PROMPTS[0]}-0.mp4"


def empty(folder: Path) -> Path:
    record_of(folder).write_text("")
    return record_of(folder)


def cut(folder: Path) -> Path:
    record_of(folder).write_text(record_of(folder).read_text()[:40])
    return record_of(folder)


def deep(folder: Path) -> Path:
    record_of(folder).write_text("[" * 100_000)
    return record_of(folder)


def no_text(folder: Path) -> Path:
    record_of(folder).write_bytes(b"\xff\xfe\x00")
    return record_of(folder)


def changed(folder: Path, **values: Any) -> Path:
    record = json.loads(record_of(folder).read_text())
    record_of(folder).write_text(json.dumps(record | values))
    return record_of(folder)


def lacks_a_field(folder: Path) -> Path:
    record = json.loads(record_of(folder).read_text())
    del record["ssim"]
    record_of(folder).write_text(json.dumps(record))
    return record_of(folder)


def no_video(folder: Path) -> Path:
    video_of(folder).unlink()
    return video_of(folder)


def cut_video(folder: Path) -> Path:
    video_of(folder).write_bytes(video_of(folder).read_bytes()[:500])
    return video_of(folder)


DAMAGES = [
    empty,
    cut,
    deep,
    no_text,
    lacks_a_field,
    lambda folder: changed(folder, psnr="20"),
    lambda folder: changed(folder, step_seconds=[]),
    lambda folder: changed(folder, prompt="another"),
    lambda folder: changed(folder, settings="of another run"),
    no_video,
    cut_video,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_clip_counts_as_missing_and_is_named(damage: Any, copy: Path) -> None:
    said: list[str] = []
    folder = Folder(copy, list(PROMPTS), json.loads((copy / MANIFEST).read_text())["settings"], said.append)
    assert folder.record("row-50", FIRST) is not None
    path = damage(copy)
    assert folder.record("row-50", FIRST) is None
    assert len(said) == 1
    assert said[0].startswith(f"{path} ")
    assert said[0].endswith("it is made again.")
    assert folder.record("none-50", FIRST) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', "[" * 100_000])
def test_a_damaged_manifest_is_named_and_written_again(text: str, copy: Path) -> None:
    said: list[str] = []
    before = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(text)
    with Folder(copy, list(PROMPTS), before["settings"], said.append).claim("evaluate", {}):
        assert json.loads((copy / MANIFEST).read_text())["settings"] == before["settings"]
    assert len(said) == 1
    assert said[0].startswith(f"{copy / MANIFEST} cannot be read")


def truncated(path: Path) -> None:
    path.write_bytes(b"\x00" * 100)


def other_tensors(path: Path) -> None:
    save_file({"video": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [truncated, other_tensors])
def test_a_damaged_reference_counts_as_missing_and_is_named(damage: Any, tmp_path: Path) -> None:
    said: list[str] = []
    folder, video = Folder(tmp_path, list(PROMPTS), {}, said.append), torch.rand(2, 3, 16, 16)
    folder.write_reference(FIRST, video)
    assert torch.equal(folder.read_reference(FIRST), video)
    [path] = tmp_path.rglob("*.safetensors")
    damage(path)
    assert folder.read_reference(FIRST) is None
    assert said[0].startswith(f"{path} cannot be read")


def test_what_is_damaged_is_made_again_and_nothing_else(
    arguments: list[str], finished: tuple[Path, str], copy: Path
) -> None:
    cut(copy)
    video_of(copy, "none-50").unlink()
    (copy / MANIFEST).write_text("{")
    reference = copy / "references" / "0000-seed0.safetensors"
    reference.parent.mkdir(exist_ok=True)
    truncated(reference)
    before = times(copy, "clips/*/*.json")
    result = evaluate(arguments, copy)
    assert result.exit_code == 0, result.output
    for path in (record_of(copy), video_of(copy, "none-50"), copy / MANIFEST, reference):
        assert f"{path} " in result.output
    assert rows(copy) == rows(finished[0])
    after = times(copy, "clips/*/*.json")
    assert {path for path in before if before[path] != after[path]} == {record_of(copy), record_of(copy, "none-50")}
    assert not list(copy.rglob(".partial-*")) + list(copy.rglob("*.safetensors"))


def test_without_a_manifest_clips_of_other_settings_are_not_taken(copy: Path) -> None:
    settings, said = json.loads((copy / MANIFEST).read_text())["settings"], []
    (copy / MANIFEST).unlink()
    folder = Folder(copy, list(PROMPTS), settings | {"fps": 99}, said.append)
    with folder.claim("evaluate", {}):
        assert json.loads((copy / MANIFEST).read_text())["settings"]["fps"] == 99
        assert folder.record("row-50", FIRST) is None
    assert said[0].endswith("is of other settings: it is made again.")


def test_what_a_killed_process_left_is_removed(copy: Path) -> None:
    left = [copy / ".partial-1-a.html", copy / "references" / ".partial-1-b.safetensors"]
    left[1].parent.mkdir(exist_ok=True)
    for path in left:
        path.write_bytes(b"0" * 1000)
    settings = json.loads((copy / MANIFEST).read_text())["settings"]
    with Folder(copy, list(PROMPTS), settings).claim("evaluate", {}):
        assert not any(path.exists() for path in left)


def test_a_folder_of_something_else_is_refused_and_untouched(arguments: list[str], tmp_path: Path) -> None:
    for name in ("metrics.json", "manifest.json", "videos/holiday.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for words in (arguments, ["demo", "--quick"]):
        result = evaluate(words, tmp_path)
        assert result.exit_code == 1
        assert f"it has no {MARK}" in result.output
    assert {path.name for path in tmp_path.rglob("*")} == {"metrics.json", "manifest.json", "videos", "holiday.mp4"}
    (tmp_path / "file").write_text("mine")
    assert "got a file; allowed: a folder" in evaluate(arguments, tmp_path / "file").output


def test_a_full_disk_ends_with_a_sentence_and_the_run_goes_on_later(
    arguments: list[str], finished: tuple[Path, str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_of(copy).unlink()
    written, sync = [], os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 3:  # the mark and its folder fit
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = evaluate(arguments, copy)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert str(copy) in result.output.split("No space left on device")[1]
    assert not list(copy.rglob(".partial-*"))
    assert evaluate(arguments, copy).exit_code == 0
    assert rows(copy) == rows(finished[0])


def test_settings_may_change_until_a_clip_is_finished(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died before it had made anything leaves a folder that the corrected command can use."""
    out = tmp_path / "out"
    quick = [*arguments, "--seeds", "1", "--steps", "1", "--frames", "2"]
    assert evaluate(quick, out, "--block-size", 2048).exit_code == 1
    assert (out / MANIFEST).is_file()
    result = evaluate(quick, out)
    assert result.exit_code == 0, result.output
    assert len(rows(out)) == len(MODES) * len(PROMPTS)


def test_a_kernel_that_does_not_run_here_is_told_before_a_folder_is_made(arguments: list[str], tmp_path: Path) -> None:
    result = evaluate(arguments, tmp_path / "out", "--floor-kernel", "cudnn")
    assert result.exit_code == 1
    assert "The SDPA kernel 'cudnn' does not run float32 on cpu here" in result.output
    assert "such as math" in result.output
    assert not (tmp_path / "out").exists()


def test_prompts_with_a_byte_order_mark_and_hostile_ones(arguments: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_bytes(b"\xef\xbb\xbf" + PROMPTS[0].encode() + b"\r\n")
    quick = ["--seeds", "1", "--steps", "1", "--frames", "2"]
    result = evaluate(arguments, tmp_path / "out", "--prompts", prompts, *quick)
    assert result.exit_code == 0, result.output
    assert [each["prompt"] for each in rows(tmp_path / "out")] == [PROMPTS[0]] * len(MODES)
    prompts.write_bytes(b"\xff\xff")
    refused = evaluate(arguments, tmp_path / "other", "--prompts", prompts)
    assert refused.exit_code == 2
    assert "p.txt: got a file that cannot be read as UTF-8 text" in refused.output


HOSTILE = (
    "=cmd|' /C calc'!A0",
    "[/bold] a [red]",
    "<script>alert(1)</script>",
    "$a_b^c$",
    "a/../../b",
    "-rf",
    "100% # ?",
)


def test_prompts_that_are_formulas_markup_or_paths_come_back_as_they_were(models: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(HOSTILE))
    words = ["evaluate", "--model", models / "wan", "--prompts", tmp_path / "p.txt", "--height", 64, "--width", 64]
    words += ["--frames", 5, "--steps", 1, "--argument", "max_sequence_length=12", "--sparsity", 0.5, "--top-p", 0]
    words += ["--block-size", 16, "--rectify", "row", "--dtype", "float32", "--device", "cpu", "--no-lpips"]
    (tmp_path / "full.yaml").write_text("{sparsity: 0.5, block_size: 16, top_p: 0}")
    out = tmp_path / "[out]"
    result = command(*words[:-1], "--out", out, "--no-lpips")
    assert result.exit_code == 0, result.output
    assert f"Report: {(out / 'report.html').resolve()}" in result.output
    lines = rows(out)
    assert {each["prompt"] for each in lines} == {"'" + HOSTILE[0], *HOSTILE[1:5], "'-rf", HOSTILE[6]}
    for each in lines:
        assert (out / each["video"]).is_file()
        assert (out / each["video"]).resolve().is_relative_to(out.resolve())
    assert "<script>alert" not in (out / "report.html").read_text()


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match=r"disk full.*a\.json"):
        write_atomically(tmp_path / "a.json", fail)
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_no_file_names_get_one() -> None:
    long = "a cat " * 60
    folder = Folder(Path("out"), ["a/b", "a b", long], {})
    names = [folder.video("full", Pair(prompt=prompt, seed=0)).name for prompt in ("a/b", "a b", long)]
    assert names[1] == "a b-0.mp4"
    assert len(set(names)) == 3
    assert all(len(name.encode()) < 256 and "/" not in name for name in names)


def test_a_folder_made_anew_loses_its_own_files_and_no_others(tmp_path: Path) -> None:
    settings = {"prompts": ["a"], "seeds": 1, "modes": [{"name": "full"}]}
    folder = Folder(tmp_path, ["a"], settings)
    pair = Pair(prompt="a", seed=0)
    with folder.claim("demo", {}):
        for path in (folder.video("full", pair), tmp_path / "videos" / "full" / "mine.mp4", tmp_path / "report.html"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        clip = Clip(mode=full_mode(), pair=pair, video=torch.rand(2, 3, 16, 16), seconds=1.0, steps=(1.0,))
        folder.write_record(measure(clip, clip.video, ""))
        folder.write_reference(pair, clip.video)
    with (
        pytest.raises(ClipError, match="of another command; allowed: one of `evaluate`"),
        folder.claim("evaluate", {}),
    ):
        pass
    with Folder(tmp_path, ["b"], settings | {"prompts": ["b"]}).claim("demo", {}, clear=["report.html"]):
        assert not folder.video("full", pair).exists()
        assert not (tmp_path / "report.html").exists()
        assert not (tmp_path / "clips").exists()
        assert not (tmp_path / "references").exists()
        assert (tmp_path / "videos" / "full" / "mine.mp4").exists()
        with pytest.raises(ClipError, match="another run is at work"), folder.claim("demo", {}):
            pass
