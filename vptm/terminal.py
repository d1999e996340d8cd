"""What is shown on stderr while something takes long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


def progress_bar(shown: bool = True) -> Progress:
    """A bar on stderr that goes when it is done: description, share, count, and the task's `note`.

    Nothing is drawn where `shown` is False or stderr is no terminal; lines printed on its `console` go to stderr then
    as well. Tasks are added with `note=""`.

    Example:
        >>> with progress_bar(shown=False) as bar:
        ...     task = bar.add_task("reading", total=2, note="")
        ...     bar.update(task, advance=1, note="3 images/s")
    """
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
