"""What all studies share: means over calls, tables by hand, files that are read together."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.machine import Origin
from rectified_spaattn.lab.rows import write_rows
from studies import harness

ORIGIN = Origin(device="a CPU", torch="2", triton="", flash_attn_4="", commit="", command="a study", created="")


@dataclass(frozen=True, kw_only=True)
class Row(harness.Row):
    KEYS: ClassVar[tuple[str, ...]] = ("sparsity", "mode")
    sparsity: float
    mode: str
    error: float


def row(prompt: str, sparsity: float, mode: str, error: float) -> Row:
    return Row(prompt=prompt, seed=0, sparsity=sparsity, mode=mode, error=error)


ROWS = [
    row("a", 0.9, "none", 0.5),
    row("a", 0.9, "row", 0.2),
    row("b", 0.9, "none", 0.7),
    row("b", 0.9, "row", 0.8),
    row("a", 0.8, "row", 0.1),
]


def test_rows_are_means_over_the_calls_of_a_pair() -> None:
    measured = [
        {"sparsity": 0.9, "mode": mode, "error": error} for mode, error in (("none", 1), ("row", 4), ("row", 6))
    ]
    rows = harness.mean_rows(Row, Pair(prompt="a", seed=0), measured)
    assert rows == [row("a", 0.9, "none", 1.0), row("a", 0.9, "row", 5.0)]


def test_a_table_compares_pair_by_pair() -> None:
    lines = harness.table(ROWS, ("error",), {"mode": "none"}, ("error",)).splitlines()
    assert lines[0] == "| sparsity | mode | error | error less that of none | pairs above it |"
    assert lines[2] == "| 0.8 | row | 0.100 |  |  |"  # nothing to compare with; one pair has no interval
    assert lines[3] == "| 0.9 | none | 0.600 [0.500, 0.700] |  |  |"
    assert lines[4] == "| 0.9 | row | 0.500 [0.200, 0.800] | -0.100 [-0.300, +0.100] | 1 of 2 |"
    assert len(lines) == 5


def test_rows_of_several_files_count_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    write_rows(first, ROWS[:2], ORIGIN)
    write_rows(second, [row("a", 0.9, "row", 0.4), *ROWS[2:]], ORIGIN)
    rows, origin = harness.read([first, second], Row)
    assert rows == ROWS
    assert origin == ORIGIN


def test_a_study_refuses_a_split_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="split: got 'test'; allowed: dev or held-out"):
        harness.Options(split="test")
