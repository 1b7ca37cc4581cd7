"""`rectified-spaattn evaluate`: full attention against a list of configurations, clip by clip, resumable."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..lab.clips import evaluate as work
from ..lab.clips.clip import Mode, Pair
from ..lab.clips.evaluate import Evaluation
from ..lab.clips.folder import Folder
from ..lab.clips.models import load, source_of
from ..lab.clips.options import EvaluateOptions
from ..lab.clips.summary import FRAMES, GAINS, SCORES, ModeSummary
from ..lab.machine import device_of
from ..lab.pages.clips import HEADS, number_text, score_text
from ..lab.pages.evaluation import write_evaluation
from ..lab.pages.html import percent
from ..lab.pages.styles import FULL
from ..lab.pages.video import check_encoder
from .console import markdown_table, plain_console, print_wide, progress_bars, short_label
from .options import command_line, loading

_WIDEST = 28  # characters of a mode's name in a table


def run(options: EvaluateOptions) -> None:
    """The whole command; one of several processes where accelerate or torchrun started them."""
    console, state = plain_console(), work.processes()
    check_encoder()
    device = device_of(options.device, state.local_process_index)
    with usage_errors():
        source = source_of(options)
        evaluation = work.evaluation_of(options, source, device)
        with loading():
            pipe = load(source, options, device)
        evaluation = work.with_sparse_modes(evaluation, options, pipe)
    facts = evaluation.facts(command_line(), state.num_processes)
    folder = Folder(options.out, list(evaluation.prompts), evaluation.settings(), console.print)
    main = state.is_main_process
    with folder.claim("evaluate", facts) if main else nullcontext():
        state.wait_for_everyone()
        if main:
            print_wide(console, f"LPIPS: {facts['lpips']}")
        with state.split_between_processes(evaluation.pairs) as mine:
            fill(pipe, evaluation, folder, mine, console, quiet=not main)
        state.wait_for_everyone()
        if main:
            manifest = {"settings": folder.settings, **facts}
            records = work.records_of(evaluation, folder)
            summaries = write_evaluation(folder, evaluation.modes, records, manifest, evaluation.fps)
            pairs = f"{len(evaluation.pairs)} prompt-seed pairs; mean [95% interval]; all of it: summary.csv"
            for table in summary_tables(summaries, pairs):
                print_wide(console, table)
            console.print(f"Report: {(folder.root / 'report.html').resolve()}")


def fill(
    pipe: Any, evaluation: Evaluation, folder: Folder, pairs: Sequence[Pair], console: Console, quiet: bool = False
) -> None:
    """Make what is missing of some pairs, with two bars: clips, and the steps of the current one.

    A line a clip where the output is not a terminal; nothing with `quiet`.
    """
    progress = progress_bars(console, disable=quiet)
    todo = work.missing(folder, evaluation.modes, pairs)
    total, left = len(pairs) * len(evaluation.modes), sum(map(len, todo.values()))
    with progress:
        clips = progress.add_task("clips", total=total, completed=total - left)
        steps = progress.add_task("warming up", total=evaluation.call()["num_inference_steps"], visible=left > 0)

        def on_step(mode: Mode, pair: Pair, done: int) -> None:
            progress.update(steps, completed=done, description=short_label(mode.label))

        for count, clip in enumerate(work.complete(pipe, evaluation, folder, todo, on_step), total - left + 1):
            progress.advance(clips)
            if not quiet and not console.is_terminal:
                console.print(f"{count}/{total} {clip.mode.label}, {clip.pair.caption()}: {clip.seconds:.1f} s")
        progress.update(steps, visible=False)
    for pair in pairs:  # of a run that was killed between the last clip of a pair and this
        folder.drop_reference(pair)


def summary_tables(summaries: Sequence[ModeSummary], title: str) -> Iterator[Table]:
    """Markdown tables of at most 80 columns that can be pasted: one a score, then what it took."""
    for name in (each for each in SCORES if each in summaries[0].scores):
        worst = {"worst clip": name, "frame": FRAMES.get(name)} if name in GAINS else {}
        columns, rows = {head: key for head, key in worst.items() if key}, []
        for each in summaries:
            cells = [score_text(each.scores[name], name), *(number_text(each.worst[x], name) for x in columns.values())]
            if each.mode.name == FULL and name != "flicker":
                cells = ["reference", *("" for _ in columns)]
            rows.append([_name(each.mode), *cells])
        yield markdown_table(("attention", HEADS[name], *columns), rows)
    rows = [
        [_name(each.mode), percent(each.computed), f"{each.step_seconds:.3f}", f"{each.speedup:.2f}x", each.backend]
        for each in summaries
    ]
    yield markdown_table(("attention", "pairs", "s a step", "speed-up", "backend"), rows, title)


def _name(mode: Mode) -> str:
    """What the mode is called where there is little room."""
    name = mode.label if len(mode.label) <= _WIDEST else mode.name
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 1]}…"


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError or TypeError inside is about an option, and ends the command with exit code 2."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
