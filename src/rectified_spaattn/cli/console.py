"""What every command shows alike: text, tables and bars that fit a terminal; in full width where nobody looks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from string import Formatter
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..lab.bench.shapes import Watch

_WIDTH = 200  # of what goes into a file or another program
_LABEL = 28  # characters in front of a bar
_BAR = 20


def plain_console() -> Console:
    """Text is printed as it is: prompts and paths may hold what looks like markup."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_wide(console: Console, what: Table | str) -> None:
    """Without colour codes in the text. On a terminal it keeps to the width, lines broken between words; else full."""
    if console.is_terminal:
        title = what.title if isinstance(what, Table) else None
        if isinstance(what, Table) and title:
            what.title = None
            console.print(title, soft_wrap=False)
        console.print(what, soft_wrap=False, highlight=False)
        return
    wide = Console(file=console.file, width=max(console.width, _WIDTH), markup=False, emoji=False)
    wide.print(what, crop=False, soft_wrap=isinstance(what, str), highlight=False)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A Markdown table; columns whose cells all begin with a figure (or are empty) are set flush right.

    Where a terminal is too narrow other columns are broken into lines, and no figure is cut.
    """
    table = Table(title=title, box=box.MARKDOWN)
    for place, column in enumerate(columns):
        figures = all(re.match(r"[-+]?\d|$", row[place]) for row in rows)
        table.add_column(column, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def row_table(columns: Mapping[str, str], rows: Sequence[Any], title: str | None = None) -> Table:
    """A Markdown table with one line a row.

    columns: heading -> format string of the row, such as "{0.ms:.3f}"; a cell is empty where a value of it is None.
    """
    return markdown_table(tuple(columns), [[_cell(text, row) for text in columns.values()] for row in rows], title)


def shown(columns: Mapping[str, str], short: Sequence[str], wide: bool) -> dict[str, str]:
    """All of them, or those that 80 columns hold. short: these, by the words that they begin with and then have."""
    if wide:
        return dict(columns)
    return {word: text for word in short for name, text in columns.items() if name.startswith(word)}


def _cell(text: str, row: Any) -> str:
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    values = [Formatter().get_field(name, (row,), {})[0] for name in names]
    return "" if any(value is None for value in values) else text.format(row)


def short_label(text: str) -> str:
    """What stands in front of a bar, cut to its place."""
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def progress_bars(console: Console, *more: ProgressColumn, disable: bool = False, transient: bool = False) -> Progress:
    """Bars with a short label, a count, the time that is left and `more`; none where the output is not a terminal.

    transient: they go away when done.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    hidden = disable or not console.is_terminal
    return Progress(*columns, *more, console=console, disable=hidden, transient=transient)


@contextmanager
def progress(console: Console, quiet: bool = False) -> Iterator[Watch]:
    """One bar that goes away when it is finished; none where the output is not a terminal, or quiet is asked for."""
    with progress_bars(console, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting")
        yield lambda what, finished, total: bar.update(
            task, description=short_label(what), completed=finished, total=total
        )
