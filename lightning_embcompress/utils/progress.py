"""One progress bar for every long step, shown by the process of rank zero only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_shown: list[Progress] = []


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on standard error and yield a function that advances it.

    The bar goes to standard error, so that it never mixes with output that another program reads, and vanishes
    when it is done: what remains on the screen is the result, not the waiting. A log file gets no bar. One within
    another is a line below it.

    Args:
        description: What is being done, as a person reads it (``"Counting words"``).
        total: The amount of work, in any unit; the yielded function takes increments of the same unit.

    Example:
        >>> with progress_bar("Counting", total=3) as advance:
        ...     for _ in range(3):
        ...         advance(1)
    """
    if _shown:
        # Two displays would overwrite each other's line.
        outer = _shown[-1]
        task = outer.add_task(description, total=total)
        try:
            yield lambda amount: outer.update(task, advance=amount)
        finally:
            outer.remove_task(task)
        return
    console = Console(stderr=True)
    if not console.is_terminal or getattr(rank_zero_only, "rank", 0) not in (0, None):
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        _shown.append(progress)
        try:
            yield lambda amount: progress.update(task, advance=amount)
        finally:
            _shown.remove(progress)


def say_line(line: str) -> None:
    """Write a line to standard error, above the bars, in the process of rank zero only; nothing if it is empty.

    Example:
        >>> say_line("Stays dense: 'kinds' (2000, 8).")
    """
    if line and getattr(rank_zero_only, "rank", 0) in (0, None):
        console = _shown[-1].console if _shown else Console(stderr=True)
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def output_console() -> Console:
    """Where lines of the result are printed: standard output, above the bars while some are on the same terminal.

    Example:
        >>> output_console().stderr
        False
    """
    console = Console()
    # Written past the display, a line would begin where the last bar ends.
    return _shown[-1].console if _shown and console.is_terminal else console
