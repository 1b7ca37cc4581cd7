"""What a run leaves behind: rows, the machine they come from, and CSV files of both."""

import csv
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from ..backends.call import installed_version, triton_version
from ..lab.machine import device_name


@dataclass(frozen=True, kw_only=True)
class Row:
    """One baseline, or one backend at one sparsity, on one shape.

    kind         "dense" or "sparse"
    density      computed query-key pairs over all pairs; ideal: 1 / density
    ms ...       milliseconds of a call: median, quartiles, extremes
    dense        the baseline of `ratio`, and its median; ratio = dense_ms / ms
    tflops       4 * D floating-point operations for every computed pair, over the median, in TFLOP/s
    extra_bytes  peak memory of one call, its output included; None on a CPU
    not_run      the reason why there is no measurement, else empty
    """

    shape: str
    tokens: int
    heads: int
    head_dim: int
    block_size: int
    rectify: str
    order: str
    dtype: str
    kind: str
    name: str
    sparsity: float | None = None
    density: float | None = None
    ideal: float | None = None
    ms: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    repeats: int | None = None
    input_sets: int | None = None
    dense: str = ""
    dense_ms: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    extra_bytes: int | None = None
    not_run: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage of a backend: milliseconds as in Row, and its share of the sum of all stages' medians.

    whole_ms: the median of the whole call, timed on its own.
    """

    shape: str
    backend: str
    rectify: str
    order: str
    sparsity: float
    stage: str
    ms: float
    ms_q1: float
    ms_q3: float
    ms_min: float
    ms_max: float
    repeats: int
    share: float
    whole_ms: float


@dataclass(frozen=True, kw_only=True)
class ForwardRow:
    """One forward of a whole transformer with one kind of attention, eager or compiled.

    kind         "dense", "sparse", or "removed" (v copied in the place of attention: what sparsity cannot reach)
    how          "eager" or "compiled"
    layers       of the whole model; layers_low, layers_high: of the two models that were timed
    low_s ...    seconds of a forward of those two, medians
    seconds ...  of the whole model, scaled from the two round by round: median, quartiles, extremes
    unit_s, constant_s  seconds of one unit of layers, and of everything but the layers, from the medians
    measured_s   one forward of all layers, None where it was not run
    dense        the baseline of `ratio`, and its eager median; ratio = dense_s / seconds
    """

    model: str
    size: str
    tokens: int
    batch: int
    heads: int
    head_dim: int
    block_size: int
    rectify: str
    order: str
    dtype: str
    diffusers: str
    kind: str
    name: str
    sparsity: float | None
    density: float | None
    how: str
    layers: int
    layers_low: int
    layers_high: int
    units: int
    low_s: float
    high_s: float
    unit_s: float
    constant_s: float
    seconds: float
    seconds_q1: float
    seconds_q3: float
    seconds_min: float
    seconds_max: float
    repeats: int
    measured_s: float | None
    dense: str
    dense_s: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class ScheduleRow:
    """A denoising run, computed from forwards and a preset's schedule.

    name                 backend; how: "eager" or "compiled", of the sparse run
    computed_steps       of `steps`; the others are skipped by a cache and cost nothing here. source: who says so
    dense_forward_s      a forward of a dense step; sparse_forward_s: of another, its dense layers included
    total_s              calls * (dense_steps * dense_forward_s + (computed_steps - dense_steps) * sparse_forward_s)
    dense, dense_total_s the eager baseline and all steps with it; speedup = dense_total_s / total_s
    paper                published speed-up at this sparsity; paper_composed: with TeaCache; None where there is none
    steps_for_composed   most computed steps with which `paper_composed` is reached, None where it never is
    """

    model: str
    size: str
    preset: str
    how: str
    name: str
    rectify: str
    order: str
    sparsity: float
    density: float
    steps: int
    computed_steps: int
    source: str
    dense_steps: int
    dense_layers: int
    calls: int
    dense_forward_s: float
    sparse_forward_s: float
    total_s: float
    dense: str
    dense_total_s: float
    speedup: float
    paper: float | None
    paper_composed: float | None
    steps_for_composed: int | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what a run was made; empty where something is not installed or not known."""

    device: str
    torch: str
    triton: str
    flash_attn_4: str
    commit: str
    command: str
    created: str


R = TypeVar("R", Row, StageRow, ForwardRow, ScheduleRow)


def machine(device: torch.device, command: str) -> Machine:
    return Machine(
        device=device_name(device),
        torch=torch.__version__,
        triton=triton_version() or "",
        flash_attn_4=installed_version("flash-attn-4") or "",
        commit=_commit(Path(__file__).parent),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_csv(path: Path, rows: Sequence[Any], made_on: Machine) -> None:
    """One line a row, each with the machine's columns after its own. The folder is made where it is missing.

    rows: instances of one dataclass. Raises ValueError for none.
    """
    if not rows:
        raise ValueError(f"{path}: got no rows; allowed: one or more.")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{**asdict(row), **asdict(made_on)} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: Path, kind: type[R]) -> tuple[list[R], Machine]:
    """The rows of a file that write_csv wrote, and the machine of the first. Raises ValueError for another file."""
    if not path.is_file():
        raise ValueError(f"{path}: got no such file; allowed: a CSV that `rectified-spaattn bench` wrote.")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    wanted = [field.name for field in (*fields(kind), *fields(Machine))]
    missing = [name for name in wanted if not lines or name not in lines[0]]
    if missing:
        raise ValueError(f"{path}: got no column {', '.join(missing)}; allowed: a CSV written by this version.")
    rows = [_from_text(kind, line) for line in lines]
    return rows, _from_text(Machine, lines[0])


def _from_text(kind: type[Any], line: dict[str, str]) -> Any:
    hints = get_type_hints(kind)
    return kind(**{name: _value(line[name], hint) for name, hint in hints.items()})


def _value(text: str, hint: Any) -> Any:
    if hint is str:
        return text
    if hint is bool:
        return text == "True"
    if text == "" and hint in (int | None, float | None):
        return None
    return int(text) if hint in (int, int | None) else float(text)


def _commit(folder: Path) -> str:
    """The commit of a checkout that holds this folder, with "-dirty" after it where files were changed."""
    if shutil.which("git") is None or _git(folder, "ls-files", "--error-unmatch", "record.py") == "":
        return ""  # installed, not checked out
    return _git(folder, "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
