"""What a person looks at of a sweep: tables on the screen, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table as ScreenTable

from lightning_embcompress.cli.compare import curves, print_table, show_comparison
from lightning_embcompress.cli.sweep import Point
from lightning_embcompress.utils.files import explaining_failure, replacing


def show_sweep(points: Sequence[Point], targets: Mapping[str, int] | None = None) -> None:
    """Print a sweep: all points, and those of the Pareto front by bands of token frequency.

    Args:
        points: As `sweep` returns them.
        targets: Name of a band to the number of target tokens that were measured in it.
    """
    columns = {"nats": lambda point: "" if point.loss is None else f"{point.loss:+.4f}"}
    if any(point.predicted_loss for point in points):
        columns["predicted"] = lambda point: "" if point.predicted_loss is None else f"{point.predicted_loss:+.4f}"
    columns["Pareto"] = lambda point: "*" if point.pareto else ""
    show_comparison(points, "Perplexity against stored bytes, no training (* nothing is smaller and better)", columns)
    front = pareto_points(points)
    bands = band_names(front)
    if not bands:
        return
    dense = _dense(points)
    titles = [name if targets is None else f"{name}\n{targets.get(name, 0):,} tokens" for name in bands]
    screen = ScreenTable(
        "method", "ratio", "all", *titles, title="Perplexity by how frequent the token is, Pareto front"
    )
    # Methods that cannot be so large give the same for several ratios.
    distinct = {(point.method, point.stored_bytes): point for point in [dense, *reversed(front)]}
    for point in distinct.values():
        cells = [_cell(point.bands.get(name), dense.bands.get(name), point is dense) for name in bands]
        screen.add_row(
            point.method, f"{point.ratio:.2f}x", _cell(point.perplexity, dense.perplexity, point is dense), *cells
        )
    print_table(screen)


def pareto_points(points: Sequence[Point]) -> list[Point]:
    """The points of the Pareto front, the smallest first."""
    return sorted((point for point in points if point.pareto), key=_megabytes)


def band_names(points: Sequence[Point]) -> list[str]:
    """Names of all bands of token frequency, the most frequent first."""
    return list(dict.fromkeys(name for point in points for name in point.bands))


def write_sweep(folder: Path, points: Sequence[Point]) -> list[Path]:
    """Write `sweep.csv` and, where matplotlib is installed, `sweep.png` into the folder of a sweep.

    Args:
        folder: Where `sweep.json` is; files that are there are replaced in one step.
        points: As `sweep` returns them.

    Returns:
        The files that were written.

    Raises:
        OSError: If a file cannot be written; the one before is as it was.
    """
    table, bands = folder / "sweep.csv", band_names(points)
    names = [field.name for field in fields(Point) if field.name != "bands"]
    with (
        explaining_failure(table),
        replacing(table) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*names, *(f"perplexity_{name}" for name in bands)], extrasaction="ignore")
        writer.writeheader()
        for point in points:
            writer.writerow(asdict(point) | {f"perplexity_{name}": point.bands.get(name) for name in bands})
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return [table]
    plot = folder / "sweep.png"
    with explaining_failure(plot), replacing(plot) as temporary:
        draw_sweep(points).savefig(temporary, dpi=150, format="png")
    return [table, plot]


def draw_sweep(points: Sequence[Point]) -> Any:
    """Draw a sweep: perplexity against stored bytes and, where there are bands, who pays on the Pareto front.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    # Not pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    front, dense = pareto_points(points), _dense(points)
    bands = [name for name in band_names(points) if dense.bands.get(name) is not None]
    figure = Figure(figsize=(14 if bands else 8, 5.5), layout="constrained")
    axes = figure.add_subplot(1, 2 if bands else 1, 1)
    for index, (name, line) in enumerate(curves(points, _megabytes)):
        # Ten colours, so that ten methods more look different.
        style: dict[str, Any] = {"marker": "os^Dv"[index // 10 % 5], "markersize": 4, "linewidth": 1}
        axes.plot(*zip(*line, strict=True), label=name, **style)
    sizes, heights = [_megabytes(point) for point in front], [_perplexity(point) for point in front]
    axes.plot(sizes, heights, color="black", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.plot(sizes, heights, "o", color="black", markersize=9, fillstyle="none", linestyle="", label="Pareto front")
    axes.axhline(_perplexity(dense), color="black", linewidth=1, linestyle=":", label="dense")
    _finish(axes, "perplexity")
    if bands:
        axes = figure.add_subplot(1, 2, 2)
        for name in bands:
            line = [
                (_megabytes(point), value / (dense.bands[name] or 1))
                for point in front
                if (value := point.bands.get(name)) is not None
            ]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"tokens of {name.replace('_', ' ')}")
        axes.axhline(1, color="black", linewidth=1, linestyle=":", label="dense")
        _finish(axes, "perplexity / dense, on the Pareto front")
    return figure


def _finish(axes: Any, height: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter

    def plain(chosen: Any) -> Any:
        """Leaves out what would be too many labels, and writes 90, not 9 x 10^1."""
        return FuncFormatter(lambda x, pos: f"{x:g}" if chosen(x, pos) else "")

    axes.set(xlabel="stored bytes of the tables, MB", ylabel=height, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        for chosen, set_formatter in (
            (LogFormatter(), axis.set_major_formatter),
            (LogFormatter(minor_thresholds=(2, 0.5)), axis.set_minor_formatter),
        ):
            # It looks at the axis to see how many labels there would be.
            chosen.set_axis(axis)
            set_formatter(plain(chosen))
    axes.legend(fontsize=7)


def _dense(points: Sequence[Point]) -> Point:
    return next(point for point in points if point.method == "dense")


def _megabytes(point: Point) -> float:
    return (point.stored_bytes or 0) / 1e6


def _perplexity(point: Point) -> float:
    assert point.perplexity is not None
    return point.perplexity


def _cell(value: float | None, dense: float | None, is_dense: bool) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if is_dense or dense is None else f"{value:.2f} ({value / dense - 1:+.1%})"
