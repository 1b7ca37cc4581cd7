"""What every command shows in the terminal alike: text in full width, and bars."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..benchmark.op import Watch

_WIDTH = 200  # tables are meant to be pasted, so they are not squeezed into a narrow terminal


def print_wide(console: Console, what: Table | str) -> None:
    """In full width and without colour codes in the text, wherever it goes."""
    wide = Console(file=console.file, width=max(console.width, _WIDTH))
    wide.print(what, crop=False, soft_wrap=isinstance(what, str), markup=False, highlight=False)


def progress_bars(console: Console, *more: ProgressColumn, disable: bool = False, transient: bool = False) -> Progress:
    """Bars with a description, a count, the time that has passed and `more`. transient: they go away when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    return Progress(*columns, console=console, disable=disable, transient=transient)


@contextmanager
def progress(console: Console) -> Iterator[Watch]:
    """One bar that goes away when it is done; none where the output is not a terminal."""
    with progress_bars(console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
