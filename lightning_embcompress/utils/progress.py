"""Progress of every long step: bars on a terminal, a line now and then in a log; by the process of rank zero only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0

_shown: list[Progress] = []
# When the last line went to a log, by `time.monotonic`.
_last_line = -float("inf")


@contextmanager
def progress_bar(description: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show how far a step is on standard error, with its rate and the time left; yield a function that advances it.

    On a terminal it is a bar, which vanishes when the step is done: what remains on the screen is the result, not the
    waiting. Elsewhere (a log file, a batch system, a notebook) a line is written every 10 seconds, also while nothing
    advances; steps that take less leave none. One step within another is a line below it.

    Args:
        description: What is being done, as a person reads it (``"Counting words"``).
        total: The amount of work, in any unit; the yielded function takes increments of the same unit. None if it is
            not known.
        unit: Of the amount, for the rate (``"tokens"``); none is shown without.

    Example:
        >>> with progress_bar("Counting", total=3, unit="words") as advance:
        ...     for _ in range(3):
        ...         advance(1)
    """
    if not _is_rank_zero():
        yield lambda _: None
        return
    # Two displays would overwrite each other's line.
    with nullcontext(_shown[-1]) if _shown else _display() as display:
        task = display.add_task(description, total=total, unit=unit)
        try:
            yield lambda amount: display.update(task, advance=amount)
        finally:
            done = next(one for one in display.tasks if one.id == task)
            display.remove_task(task)
            if done.fields.get("is_in_log"):
                _log(f"{_named(done)}, done")


def say_line(line: str) -> None:
    """Write a line to standard error, above the bars, in the process of rank zero only; nothing if it is empty.

    Example:
        >>> say_line("Stays dense: 'kinds' (2000, 8).")
    """
    if line and _is_rank_zero():
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
    has_bars = bool(_shown) and _shown[-1].console.is_terminal
    return _shown[-1].console if has_bars and console.is_terminal else console


@contextmanager
def _display() -> Iterator[Progress]:
    """Where the steps of this process are shown, bars or lines, while the outermost of them lasts."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _Status())
    display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with display if console.is_terminal else _lines(display):
        _shown.append(display)
        try:
            yield display
        finally:
            _shown.remove(display)


@contextmanager
def _lines(display: Progress) -> Iterator[None]:
    """Write a line about all steps of a display every some seconds."""
    global _last_line
    now, ended = time.monotonic(), threading.Event()
    # Many short steps one after the other are a long one. After a pause nobody waits for the first line.
    if now - _last_line > 2 * _SECONDS_BETWEEN_LINES:
        _last_line = now

    def write() -> None:
        # In a thread of its own: a step may take minutes until it advances.
        while not ended.wait(max(0.0, _last_line + _SECONDS_BETWEEN_LINES - time.monotonic())):
            tasks = display.tasks
            for task in tasks:
                task.fields["is_in_log"] = True
            _log("; ".join(map(_named, tasks)))

    writer = threading.Thread(target=write, name="embcompress progress", daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def _log(line: str) -> None:
    global _last_line
    _last_line = time.monotonic()
    say_line(line)


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) in (0, None)


class _Status(ProgressColumn):
    """How far, how fast and how long."""

    def render(self, task: Task) -> Text:
        return Text(_status(task))


def _named(task: Task) -> str:
    return f"{task.description}: {_status(task)}"


def _status(task: Task) -> str:
    elapsed = task.elapsed or 0.0
    # Of all that was done, as steps may be long.
    rate = task.completed / elapsed if elapsed else 0.0
    unit = task.fields["unit"]
    parts = [] if task.total is None else [f"{task.percentage:.0f}%"]
    if unit and task.total is None:
        parts.append(f"{task.completed:,.0f} {unit}")
    if unit and rate:
        parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s")
    parts.append(f"{_clock(elapsed)} elapsed")
    if task.total is not None and rate and task.completed < task.total:
        parts.append(f"{_clock((task.total - task.completed) / rate)} left")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
