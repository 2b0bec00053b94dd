"""What a person looks at of a sweep: tables on the screen, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table as ScreenTable

from lightning_embcompress.cli.sweep_record import Point
from lightning_embcompress.compression.report import print_table
from lightning_embcompress.utils.files import explaining_failure, replacing

_COLUMNS = ("asked", "method", "ratio", "bits", "MB", "model", "perplexity", "", "nats", "predicted", "seconds", "*")


def show_sweep(points: Sequence[Point], targets: Mapping[str, int] | None = None) -> None:
    """Print a sweep: all points, and those of the Pareto front by bands of token frequency.

    Args:
        points: As `sweep` returns them.
        targets: Name of a band to the number of target tokens that were measured in it.
    """
    dense = _dense(points)
    screen = ScreenTable(*_COLUMNS, title="Perplexity against stored bytes, no training (* nothing smaller is better)")
    before: float | None = None
    for point in points:
        if point.asked_ratio != before:
            screen.add_section()
        before = point.asked_ratio
        screen.add_row(*_cells(point, dense))
    print_table(screen)
    front = [point for point in sorted(points, key=_megabytes) if point.pareto]
    bands = _bands(front)
    if not bands:
        return
    titles = [name if targets is None else f"{name}\n{targets.get(name, 0):,} tokens" for name in bands]
    screen = ScreenTable("method", "ratio", "bits", "all", *titles, title="Perplexity by token frequency, Pareto front")
    # Methods that cannot be so large give the same for several ratios.
    distinct = {(point.method, point.stored_bytes): point for point in [dense, *reversed(front)]}
    for point in distinct.values():
        values = [(point.perplexity, dense.perplexity)]
        values += [(point.bands.get(name), dense.bands.get(name)) for name in bands]
        sizes = f"{point.ratio:.2f}x", _number(point.bits_per_weight, ".2f")
        screen.add_row(point.method, *sizes, *(_change(*pair, point is dense) for pair in values))
    print_table(screen)


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
    table, bands = folder / "sweep.csv", _bands(points)
    names = [field.name for field in fields(Point) if field.name not in ("bands", "losses")]
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

    dense, known = _dense(points), [point for point in sorted(points, key=_megabytes) if point.perplexity is not None]
    front = [point for point in known if point.pareto]
    bands = [name for name in _bands(points) if dense.bands.get(name) is not None]
    figure = Figure(figsize=(14 if bands else 8, 5.5), layout="constrained")
    axes = figure.add_subplot(1, 2 if bands else 1, 1)
    for index, name in enumerate(dict.fromkeys(point.method for point in points if point.method != "dense")):
        line = [(_megabytes(point), point.perplexity) for point in known if point.method == name]
        if line:
            # Ten colours, so that ten methods more look different.
            style: dict[str, Any] = {"marker": "os^Dv"[index // 10 % 5], "markersize": 4, "linewidth": 1}
            axes.plot(*zip(*line, strict=True), label=name, **style)
    steps: Any = [_megabytes(point) for point in front], [point.perplexity for point in front]
    axes.plot(*steps, color="black", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.plot(*steps, "o", color="black", markersize=9, fillstyle="none", linestyle="", label="Pareto front")
    _finish(axes, "perplexity", dense.perplexity)
    _show_bits(axes, dense)
    if bands:
        axes = figure.add_subplot(1, 2, 2)
        for name in bands:
            base = dense.bands[name] or 1
            ratios = [(_megabytes(one), value / base) for one in front if (value := one.bands.get(name)) is not None]
            axes.plot(*zip(*ratios, strict=True), marker="o", markersize=4, label=f"tokens of {name.replace('_', ' ')}")
        _finish(axes, "perplexity / dense, on the Pareto front", 1)
        _show_bits(axes, dense)
    return figure


def _finish(axes: Any, height: str, dense: float | None) -> None:
    axes.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel="stored bytes of the tables, MB", ylabel=height, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.legend(fontsize=7)


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, as numbers and not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _show_bits(axes: Any, dense: Point) -> None:
    """The same sizes in bits per weight, above the plot; points of earlier versions do not know them."""
    if dense.bits_per_weight is None:
        return
    bits = dense.bits_per_weight / _megabytes(dense)
    above = axes.secondary_xaxis("top", functions=(lambda size: size * bits, lambda one: one / bits))
    above.set_xlabel("bits per weight")
    _plain_numbers(above.xaxis)


def _dense(points: Sequence[Point]) -> Point:
    return next(point for point in points if point.method == "dense")


def _bands(points: Sequence[Point]) -> list[str]:
    """Names of all bands of token frequency, the most frequent first."""
    return list(dict.fromkeys(name for point in points for name in point.bands))


def _megabytes(point: Point) -> float:
    return (point.stored_bytes or 0) / 1e6


def _cells(point: Point, dense: Point) -> list[str]:
    asked = "" if point.asked_ratio is None else f"{point.asked_ratio:.2f}x"
    if point.asked_bits_per_weight is not None:
        asked = f"{point.asked_bits_per_weight:g} bits"
    cells = [asked, point.method]
    if point.stored_bytes is None:
        return [*cells, "", "", "", "", "cannot be reached"]
    assert dense.perplexity is not None
    return [
        *cells,
        f"{point.ratio:.2f}x",
        _number(point.bits_per_weight, ".2f"),
        f"{point.stored_bytes / 1e6:.2f}",
        f"{point.model_ratio:.2f}x",
        "not finite" if point.perplexity is None else f"{point.perplexity:.2f}",
        "" if point.perplexity is None else f"{point.perplexity / dense.perplexity - 1:+.1%}",
        _rise(point, dense),
        _number(point.predicted_loss, "+.4f"),
        _number(point.seconds, ".1f"),
        "*" if point.pareto else "",
    ]


def _rise(point: Point, dense: Point) -> str:
    """Growth of the mean loss, with its standard error where the losses of blocks are known."""
    text = next(iter(point.losses), None)
    if text is None or point is dense or text not in dense.losses:
        return _number(point.loss, "+.4f")
    change, error = point.change(dense, text)
    return f"{change:+.4f} ± {error:.4f}"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _change(value: float | None, dense: float | None, is_dense: bool) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if is_dense or dense is None else f"{value:.2f} ({value / dense - 1:+.1%})"
