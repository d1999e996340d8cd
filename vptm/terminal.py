"""What is shown on a terminal: results on stdout, bars and lines on the way on stderr.

rich is imported where it is used, so that a command's help does not wait for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vptm.messages import one_line

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

_LONGEST_CELL = 100_000
SECONDS_PER_LINE = 30.0
"""How long work is silent where there is no terminal to draw a bar on."""


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def say_once(line: str) -> None:
    """A line on stderr, from one of the processes that torchrun starts on a machine with the same line to say.

    A process may be the only one that fails, as on a GPU that is not there, so that none may be silent by its rank.
    They meet in the folder of their error files, which torchrun makes for every start of its processes.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        said = Path(error_file).parents[1] / f"vptm-{hashlib.sha256(line.encode()).hexdigest()}"
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
    say(line)


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Rows of cells on stdout, each cell on one line and each column as wide as its widest: nothing is wrapped, cut or
    read as markup, and no letter moves the cursor."""
    from rich.table import Table
    from rich.text import Text

    found = [list(row) for row in rows]
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(max(map(len, found), default=0)):
        table.add_column(no_wrap=True)
    for row in found:
        table.add_row(*(Text(one_line(cell, _LONGEST_CELL)) for cell in row))
    print_table(table)


def print_table(table: Table) -> None:
    """A rich table on stdout, as wide as it is."""
    from rich.console import Console

    console = Console(width=2**20)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def progress_bar(shown: bool = True) -> Progress:
    """A bar on stderr that goes when it is done: description, share, count, and the task's `note`.

    Nothing is drawn where `shown` is False or stderr is no terminal; lines printed on its `console` go to stderr then
    as well. Tasks are added with `note=""`.

    Example:
        >>> with progress_bar(shown=False) as bar:
        ...     task = bar.add_task("reading", total=2, note="")
        ...     bar.update(task, advance=1, note="3 images/s")
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
