"""What every command shows in the terminal alike: text in full width, tables that can be pasted, and bars."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..lab.bench.shapes import Watch

_WIDTH = 200  # tables are meant to be pasted, so they are not squeezed into a narrow terminal


def plain_console() -> Console:
    """Text is printed as it is: prompts and paths may hold what looks like markup."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_wide(console: Console, what: Table | str) -> None:
    """In full width and without colour codes in the text, wherever it goes."""
    wide = Console(file=console.file, width=max(console.width, _WIDTH), markup=False, emoji=False)
    wide.print(what, crop=False, soft_wrap=isinstance(what, str), highlight=False)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A Markdown table; columns whose cells all begin with a figure (or are empty) are set flush right."""
    table = Table(title=title, box=box.MARKDOWN)
    for place, column in enumerate(columns):
        figures = all(re.match(r"[-+]?\d|$", row[place]) for row in rows)
        table.add_column(column, justify="right" if figures else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def progress_bars(console: Console, *more: ProgressColumn, disable: bool = False, transient: bool = False) -> Progress:
    """Bars with a description, a count, the time that has passed and `more`. transient: they go away when done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *more, console=console, disable=disable, transient=transient)


@contextmanager
def progress(console: Console, quiet: bool = False) -> Iterator[Watch]:
    """One bar that goes away when it is finished; none where the output is not a terminal, or quiet is asked for."""
    with progress_bars(console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("starting")
        yield lambda what, finished, total: bar.update(task, description=what, completed=finished, total=total)
