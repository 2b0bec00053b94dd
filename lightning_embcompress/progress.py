"""One progress bar for every long step, shown by the process of rank zero only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on standard error and yield a function that advances it.

    The bar goes to standard error, so that it never mixes with output that another program reads, and vanishes
    when it is done: what remains on the screen is the result, not the waiting. A log file gets no bar.

    Args:
        description: What is being done, as a person reads it (``"Counting words"``).
        total: The amount of work, in any unit; the yielded function takes increments of the same unit.

    Example:
        >>> with progress_bar("Counting", total=3) as advance:
        ...     for _ in range(3):
        ...         advance(1)
    """
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
        yield lambda amount: progress.update(task, advance=amount)
