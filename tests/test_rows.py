"""CSV rows and the machine they come from: what is written is read back, and no file is ever half there."""

import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rectified_spaattn.lab import rows as lab_rows
from rectified_spaattn.lab.machine import Origin, device_of, machine
from rectified_spaattn.lab.rows import write_atomically, write_rows
from studies.rows import read_rows

CPU = torch.device("cpu")
ORIGIN = Origin(device="=a GPU", torch="1", triton="2", flash_attn_4="", commit="c", command="-x", created="now")


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    count: int
    ms: float
    kept: bool
    sparsity: float | None = None
    repeats: int | None = None
    config: str = ""


ROWS = [
    Row(name="plain, with comma\nand line", count=-3, ms=-1.5, kept=True, sparsity=0.8, repeats=2, config="{}"),
    Row(name="=HYPERLINK(1)", count=0, ms=math.inf, kept=False),
    *(Row(name=name, count=1, ms=0.0, kept=True) for name in ("+1", "-1e3", "+a", "-", "@b", "'=c", "'d", "''-e", "")),
]


def test_rows_and_their_origin_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, ROWS, ORIGIN)
    assert read_rows(path, Row) == (ROWS, ORIGIN)
    assert [each.name for each in path.parent.iterdir()] == ["rows.csv"]


def test_no_cell_is_a_formula_and_none_and_nan_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [{"a": "=1+1", "b": None, "c": math.nan, "d": "-1.5", "e": -2}])
    assert path.read_text() == "a,b,c,d,e\n'=1+1,,,'-1.5,-2\n"
    write_rows(path, [Row(name="", count=1, ms=math.nan, kept=True)], ORIGIN)
    (row,), _ = read_rows(path, Row)
    assert math.isnan(row.ms)
    assert row.sparsity is None


def test_columns_may_be_missing_where_there_is_a_default_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rest = ",".join(Origin.__dataclass_fields__) + "\n" + "{},,,,,,,"
    path.write_text("\ufeffname,count,ms,kept," + rest.format("a,1,2.5,True"))
    assert read_rows(path, Row)[0] == [Row(name="a", count=1, ms=2.5, kept=True)]
    for text, problem in (
        ("name,ms,kept," + rest.format("a,2.5,True"), "got no column count"),
        ("name,count,ms,kept," + rest.format("a,1.5,2.5,True"), "got a cell that does not fit"),
        ("name,count,ms,kept," + rest.format("a,1,2.5,yes"), "got a cell that does not fit its column: got 'yes'"),
        ("name,count,ms,kept," + rest.format("a")[:-6], "got a cell that does not fit"),
        ("", "got no column name"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"rows.csv: {problem}"):
            read_rows(path, Row)
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "missing.csv", Row)
    with pytest.raises(ValueError, match="got no rows"):
        write_rows(path, [])


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_file_is_complete_or_as_it_was(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, lambda to: to.write_text("before"))

    def fail(to: Path) -> None:
        to.write_text("half")
        raise KeyboardInterrupt

    def no_replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(KeyboardInterrupt if step == "write" else OSError):
        write_atomically(path, fail if step == "write" else lambda to: to.write_text("after"))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    flush, replace = lab_rows._flush, os.replace
    monkeypatch.setattr(lab_rows, "_flush", lambda path, flags: (log.append(path.name[:8]), flush(path, flags)))
    monkeypatch.setattr(os, "replace", lambda *names: (log.append("replace"), replace(*names)))
    write_atomically(tmp_path / "a.txt", lambda to: to.write_text("all"))
    assert log == [".partial", "replace", tmp_path.name[:8]]


def test_the_machine_is_described_once_for_rows_and_for_json() -> None:
    here = machine(CPU)
    origin, record = here.origin("a command"), here.to_dict()
    assert origin.torch == record["versions"]["torch"] == torch.__version__
    assert origin.device == record["device"]["name"] != ""
    assert origin.command == "a command"
    assert origin.commit == "" or len(origin.commit.removesuffix("-dirty")) == 40
    assert record["device"]["type"] == "cpu"
    assert record["device"]["memory_bytes"] is None


def test_a_tool_that_hangs_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(words: list[str], **more: object) -> None:
        raise subprocess.TimeoutExpired(words, 60)

    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("subprocess.run", hang)
    here = machine(CPU)
    assert (here.commit, here.device["driver"]) == ("", None)


def test_a_device_is_refused_by_name() -> None:
    assert device_of("cpu") == CPU
    with pytest.raises(ValueError, match="got 'tpu'; allowed: auto, cpu or cuda"):
        device_of("tpu")
