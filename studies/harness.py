"""What all studies have in common: prompts and seeds, the demo model, rows to CSV, tables with intervals.

A study is a dataclass of options, a dataclass of rows and a function that measures some pairs. `run` does the rest:
it loads the model, goes through the pairs (shared out where torchrun started several processes), writes a CSV file
after each batch, so that a stopped run leaves what it measured, and prints a Markdown table.
"""

import math
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, TypeVar

import torch
import typer
from rich.progress import Progress

from rectified_spaattn import SparseConfig
from rectified_spaattn.cli.options import command
from rectified_spaattn.lab.calls.capture import AttentionCall, CaptureError, capture_calls
from rectified_spaattn.lab.clips.clip import Pair
from rectified_spaattn.lab.clips.evaluate import processes
from rectified_spaattn.lab.clips.intervals import bootstrap
from rectified_spaattn.lab.clips.options import ClipError
from rectified_spaattn.lab.demo_model.model import CAPTION_LENGTH
from rectified_spaattn.lab.demo_model.pipeline import load_demo_pipeline
from rectified_spaattn.lab.demo_model.prompts import PROMPTS
from rectified_spaattn.lab.machine import Origin, device_of, machine
from rectified_spaattn.lab.option import option
from rectified_spaattn.lab.rows import write_rows

from .demo_model.world import sample_scene
from .rows import read_rows

FRAMES = 16
DEV_PAIRS, HELD_OUT_PAIRS = 24, 16
SPLITS = ("dev", "held-out")
# The paper's method on blocks that fit the demo model, with as many blocks kept as the sparsity says and no more: on
# grids this small the 26 neighbours alone would be a quarter of all blocks.
EXACT = SparseConfig.paper(block_size=64, top_p=0.0, neighbours=False)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """On what a study measures, whatever the model. ValueError for a split or a device that does not exist."""

    split: str = option("Pairs to measure on; held-out ones are for one look, at the end.", "dev", choices=SPLITS)
    pairs: int | None = option("Only the first so many prompt-seed pairs.", None, unset="all")
    batch: int = option("Pairs in one call of the pipeline.", 1)
    step: tuple[int, ...] = option("Denoising steps whose attention calls are taken, from 0.", (3, 9))
    layer: tuple[int, ...] = option("Layers whose attention calls are taken.", (), unset="all")
    device: str = option("auto, cpu or cuda.", "auto")
    out: Path = option("Folder of the CSV files.", Path("runs"))
    table_of: tuple[Path, ...] = option("CSV files of earlier runs to print; nothing is measured then.", ())

    def __post_init__(self) -> None:
        split_pairs(self.split)
        device_of(self.device)

    @property
    def wanted(self) -> list[Pair]:
        return split_pairs(self.split)[: self.pairs]

    def load(self, device: torch.device) -> Any:
        """The pipeline that is measured."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Options(Sample):
    """What every study of the demo model can be asked for."""

    sparsity: tuple[float, ...] = option("Share of blocks to drop.", (0.8, 0.9))
    size: int = option("Height and width in pixels.", 64)
    steps: int = option("Denoising steps.", 12)
    dtype: str = option("Of clips: float32, float16 or bfloat16.", "float32")

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        size = {"height": self.size, "width": self.size, "num_frames": FRAMES}
        return {**size, "num_inference_steps": self.steps}

    def load(self, device: torch.device) -> Any:
        return load_demo_pipeline(device, getattr(torch, self.dtype))

    def calls(self, pipe: Any, pairs: Sequence[Pair], steps: Iterable[int] = ()) -> list[AttentionCall]:
        """Full-attention calls of one run of all pairs; steps: in place of the options' own."""
        wanted = tuple(steps) or self.step
        return capture_calls(pipe, pairs, self.arguments, steps=wanted, layers=self.layer or None, device=pipe.device)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair under one setting. KEYS: the fields that name the setting; those after them are measured."""

    KEYS: ClassVar[tuple[str, ...]]
    prompt: str
    seed: int

    @property
    def pair(self) -> Pair:
        return Pair(prompt=self.prompt, seed=self.seed)

    @property
    def setting(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.KEYS)


R = TypeVar("R", bound=Row)
Measure = Callable[[Any, Sequence[Pair], Callable[[str], None]], Iterable[R]]


def split_pairs(split: str) -> list[Pair]:
    """Pairs that settings are compared on ("dev", 24) or that are looked at once, at the end ("held-out", 16).

    Raises ValueError for another name.
    """
    if split == "dev":
        prompts, seed = PROMPTS + drawn_captions(DEV_PAIRS - len(PROMPTS), split), 0
    elif split == "held-out":
        prompts, seed = drawn_captions(HELD_OUT_PAIRS, split), 1
    else:
        raise ValueError(f"split: got {split!r}; allowed: dev or held-out.")
    return [Pair(prompt=prompt, seed=seed) for prompt in prompts]


def drawn_captions(count: int, draw: str) -> tuple[str, ...]:
    """Captions from the training data's grammar, all different and none of PROMPTS; the same for the same `draw`."""
    rng = random.Random(draw)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = sample_scene(rng).caption()
        if caption not in PROMPTS and len(caption.split()) < CAPTION_LENGTH:
            captions[caption] = None
    return tuple(captions)


def run(name: str, kind: type[R], options: Sample, measure: Measure[R], show: Callable[[list[R]], None]) -> None:
    """Measure and show, or show the rows of earlier runs.

    name: of the study; the file is NAME-SPLIT.csv. measure(pipe, pairs, say): the rows of a batch of pairs; say(text)
    tells what it is doing.
    """
    if options.table_of:
        rows, origin = read(options.table_of, kind)
        _print(rows, origin, show)
        return
    from accelerate.utils import gather_object

    state = processes()
    device = device_of(options.device, state.local_process_index)
    pipe = options.load(device)
    origin = machine(device).origin(shlex.join(["python", "-m", f"studies.{name}", *sys.argv[1:]]))
    path = options.out / f"{name}-{options.split}.csv"
    rows = []
    with (
        state.split_between_processes(options.wanted) as mine,
        Progress(disable=not state.is_main_process) as progress,
    ):
        task = progress.add_task("pairs", total=len(mine))
        for batch in (mine[i : i + options.batch] for i in range(0, len(mine), options.batch)):
            for row in measure(pipe, batch, lambda text: progress.update(task, description=text)):
                rows.append(row)
                if state.num_processes == 1:
                    write_rows(path, rows, origin)
            progress.advance(task, len(batch))
    if state.num_processes > 1:
        rows = gather_object(rows)
    if state.is_main_process:
        write_rows(path, rows, origin)
        _print(rows, origin, show)
        print(f"\n{path}")


def read(paths: Sequence[Path], kind: type[R]) -> tuple[list[R], Origin]:
    """The rows of all files, of a pair and setting the first one in them; the first file's origin."""
    files = [read_rows(path, kind) for path in paths]
    first: dict[tuple[Any, ...], R] = {}
    for row in (row for rows, _ in files for row in rows):
        first.setdefault((row.pair, row.setting), row)
    return list(first.values()), files[0][1]


def on_calls(
    kind: type[R],
    options: Options,
    judge: Callable[[Sequence[AttentionCall]], Iterable[Mapping[str, Any]]],
    steps: Iterable[int] = (),
) -> Measure[R]:
    """A measure for `run` that looks at single attention calls: judge gets all calls of one pair; see mean_rows."""

    def measure(pipe: Any, pairs: Sequence[Pair], say: Callable[[str], None]) -> Iterable[R]:
        for pair in pairs:
            say(pair.prompt[:40])
            yield from mean_rows(kind, pair, judge(options.calls(pipe, [pair], steps)))

    return measure


def mean_rows(kind: type[R], pair: Pair, measured: Iterable[Mapping[str, Any]]) -> list[R]:
    """One row a setting: means of what was measured, mappings of `kind`'s fields without those of the pair."""
    by_setting = defaultdict(list)
    for each in measured:
        by_setting[tuple(each[name] for name in kind.KEYS)].append(each)
    return [
        kind(
            prompt=pair.prompt,
            seed=pair.seed,
            **dict(zip(kind.KEYS, setting, strict=True)),
            **{name: fmean(each[name] for each in some) for name in some[0] if name not in kind.KEYS},
        )
        for setting, some in by_setting.items()
    ]


def table(
    rows: Sequence[R], measures: Sequence[str], reference: Mapping[str, Any] | None = None, gains: Sequence[str] = ()
) -> str:
    """A Markdown table, one line a setting: means with 95% intervals (percentile bootstrap over the pairs).

    reference: values of KEYS that make another setting of each; `gains` are then measures less those of that setting,
    pair by pair, and the last column is in how many pairs the first gain is above 0.
    """
    keys = rows[0].KEYS
    heads = [*keys, *measures, *(f"{name} less that of {_words(reference or {})}" for name in gains)]
    heads += ["pairs above it"] * bool(gains)
    lines = [f"| {' | '.join(head.replace('_', ' ') for head in heads)} |", "|---" * len(heads) + "|"]
    by_setting = settings_of(rows)
    for setting, mine in by_setting.items():
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in setting]
        cells += [interval([getattr(row, name) for row in mine.values()]) for name in measures]
        other = tuple((reference or {}).get(name, value) for name, value in zip(keys, setting, strict=True))
        for name in gains:
            cells.append("" if other == setting else interval(differences(mine, by_setting.get(other, {}), name), "+"))
        if gains:
            won = [gain > 0 for gain in differences(mine, by_setting.get(other, {}), gains[0])]
            cells.append(f"{sum(won)} of {len(won)}" if won and other != setting else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_of(rows: Sequence[R]) -> dict[tuple[Any, ...], dict[Pair, R]]:
    """The rows of every setting by their pairs, by rising first key."""
    by_setting: dict[tuple[Any, ...], dict[Pair, R]] = defaultdict(dict)
    for row in rows:
        by_setting[row.setting][row.pair] = row
    return dict(sorted(by_setting.items(), key=lambda item: item[0][0]))


def differences(mine: Mapping[Pair, Row], other: Mapping[Pair, Row], name: str) -> list[float]:
    """Pair by pair, over the pairs that both have."""
    return [getattr(mine[pair], name) - getattr(other[pair], name) for pair in mine if pair in other]


def interval(values: Sequence[float], sign: str = "") -> str:
    """The text "mean [low, high]" with three digits; nothing where there is no mean."""
    return "" if not values or math.isnan(fmean(values)) else bootstrap(values).text(3, sign)


def main(kind: type[Any], study: Callable[[Any], None]) -> None:
    """Run a study with options from the command line."""
    application(kind, study)()


def application(kind: type[Any], study: Callable[[Any], None]) -> typer.Typer:
    """A command line of one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(kind, study, (ClipError, CaptureError)))
    return app


def _words(reference: Mapping[str, Any]) -> str:
    return ", ".join(map(str, reference.values()))


def _print(rows: list[R], origin: Origin, show: Callable[[list[R]], None]) -> None:
    print(f"\n{len({row.pair for row in rows})} prompt-seed pairs; {origin.device}, torch {origin.torch}")
    print(f"{origin.command}\nmean [95% interval of the mean, percentile bootstrap over the pairs]\n")
    show(rows)
