"""All methods on one trained model, at equal stored bytes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table as ScreenTable
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.trials import DEFAULT_METHODS as DEFAULT_METHODS
from lightning_embcompress.cli.trials import Candidate as Candidate
from lightning_embcompress.cli.trials import Result as Result
from lightning_embcompress.cli.trials import carry_out, plan_trials
from lightning_embcompress.utils.progress import progress_bar

_AnyResult = TypeVar("_AnyResult", bound=Result)


def compare(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    methods: Sequence[str] = DEFAULT_METHODS,
    ratios: Sequence[float] = (16.0,),
    *,
    bits: Sequence[int] = (8, 4),
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    statistics: Callable[[], Statistics] | None = None,
    on_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Compress copies of a model by every method and measure them, without training.

    Plain quantization of the tables, to integers in groups of 32 with 16-bit scales, is part of it: its ratios are
    added to those asked for, so that every method is seen at the very bytes of int8 and int4.

    Args:
        model: The trained model; it is not changed.
        evaluate: Measures the perplexity of a model.
        methods: Candidates, see `Candidate.parse`.
        ratios: Dense bytes over stored bytes of the tables.
        bits: Widths of plain quantization, 2 to 8; none for a comparison without it.
        tables: See `lightning_embcompress.tables.replacement.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data.
        statistics: Called before the first method is solved that weighs errors by what the loss grows by; gives the
            statistics of the model. Without them methods that can do otherwise weight rows by their counts alone.
        on_result: Called with every line as soon as it is known: the whole may take long.

    Returns:
        The dense model first, then by ratio, the best perplexity first; what cannot be reached comes last.

    Raises:
        ValueError: If a method, an option, a ratio or the counts cannot be used; nothing is solved then.
    """
    trials = plan_trials(model, methods, ratios, bits, tables=tables, token_counts=token_counts, at_sizes_of_bits=True)
    results: list[Result] = []
    known: Statistics | None = None
    with progress_bar("Comparing methods", total=sum(not trial.note for trial in trials)) as advance:
        # What cannot be reached is known before anything is solved, and said first.
        for trial in sorted(trials, key=lambda trial: not trial.note):
            if known is None and statistics is not None and trial.uses_loss:
                known = statistics()
            solved = carry_out(trial, model, tables=tables, token_counts=token_counts, statistics=known)
            perplexity = None if solved.model is None else evaluate(solved.model)
            sizes = solved.ratio, solved.stored_bytes, solved.model_ratio
            results.append(Result(trial.name, trial.ratio, *sizes, perplexity, solved.seconds, solved.note))
            on_result(results[-1])
            advance(0 if trial.note else 1)
    return sorted(results, key=lambda result: result.order)


def show_comparison(
    results: Sequence[Result],
    title: str = "At equal stored bytes, no training",
    columns: Mapping[str, Callable[[Any], str]] | None = None,
) -> None:
    """Print a comparison, a section for each ratio.

    Args:
        results: Its lines, sorted.
        title: What is written above.
        columns: Further columns: their names, and what stands there for a line.
    """
    dense = next(result.perplexity for result in results if result.method == "dense")
    assert dense is not None
    further = dict(columns or {})
    screen = ScreenTable("asked", "method", "ratio", "MB", "model", "perplexity", "", "seconds", *further, title=title)
    before: float | None = None
    for result in results:
        asked = result.asked_ratio
        if asked != before:
            screen.add_section()
        before = asked
        cells = ["" if asked is None else f"{asked:.2f}x", result.method]
        if result.stored_bytes is None:
            screen.add_row(*cells, "", "", "", "cannot be reached")
            continue
        cells += [f"{result.ratio:.2f}x", f"{result.stored_bytes / 1e6:.2f}", f"{result.model_ratio:.2f}x"]
        if result.perplexity is None:
            cells += ["not finite", ""]
        else:
            cells += [f"{result.perplexity:.2f}", f"{result.perplexity / dense - 1:+.1%}"]
        cells.append("" if result.seconds is None else f"{result.seconds:.1f}")
        screen.add_row(*cells, *(cell(result) for cell in further.values()))
    print_table(screen)


def print_table(screen: ScreenTable) -> None:
    """Print a table in the width of the terminal, or wide enough for a log file, which has none of its own."""
    console = Console()
    (console if console.is_terminal else Console(width=132)).print(screen)


def write_comparison(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write `comparison.csv`, `comparison.json` and, where matplotlib is installed, `comparison.png`.

    Returns:
        The files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / "comparison.csv", folder / "comparison.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    record.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return [table, record]
    # Not pyplot: no window system is asked for, and no global state is left behind.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves(results, lambda result: result.ratio or 0):
        style = {"marker": "o", "markersize": 4} if len(points) > 1 else {"marker": "s", "linestyle": ""}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    dense = next(result.perplexity for result in results if result.method == "dense")
    assert dense is not None
    axes.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel="dense bytes / stored bytes of the tables", ylabel="perplexity", xscale="log", yscale="log")
    axes.legend(fontsize=7)
    plot = folder / "comparison.png"
    figure.savefig(plot, dpi=150)
    return [table, record, plot]


def curves(
    results: Sequence[_AnyResult], width: Callable[[_AnyResult], float]
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """What is to be drawn, but the dense model.

    Args:
        results: Lines of a comparison or a sweep.
        width: Gives the horizontal coordinate of a line that has a perplexity.

    Yields:
        A method, and its points `(width, perplexity)` from left to right.
    """
    for name in dict.fromkeys(result.method for result in results if result.method != "dense"):
        points = [
            (width(result), result.perplexity)
            for result in results
            if result.method == name and result.perplexity is not None
        ]
        if points:
            yield name, sorted(points)
