"""What a person looks at of times: tables on the screen and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table as ScreenTable

from lightning_embcompress.cli.compare import print_table
from lightning_embcompress.compression.report import say

_COLUMNS = ("", "ms", "x dense", "MB stored", "MB at the peak", "error", "ms at least", "times that", "")
# Markers of a plot, so that ten colours are enough.
_MARKERS = "os^Dv"


def show_speed(report: Mapping[str, Any]) -> None:
    """Print what `run_speed_bench` returned."""
    bench, table = report["bench"], report.get("table")
    show_machine(report["machine"])
    for count, rates in report["rates"].items():
        say(
            f"{threads_of(int(count))}: {rates['flops'] / 1e9:,.0f} G operations/s in float32 products, "
            f"{rates['bytes'] / 1e9:.1f} GB/s from memory, {rates['exponentials'] / 1e9:.2f} G exponentials/s"
        )
    if table is not None:
        say(
            f"{bench['method']}: {bench['vocab_size']:,} x {bench['dim']:,} in {table['stored_bytes'] / 1e6:,.2f} MB, "
            f"{table['ratio']:.2f}x, compressed in {table['seconds']:.1f} seconds"
        )
    for what, count in dict.fromkeys((row["what"], row["threads"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["what"], row["threads"]) == (what, count)]
        show_rows(rows, f"{title_of(what, bench)}, {threads_of(count)}")


def show_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print entries of `speed_measure.measure` that belong together."""
    screen = ScreenTable(*_COLUMNS, title=title)
    for row in rows:
        screen.add_row(*_cells(row))
    print_table(screen)


def show_machine(machine: Mapping[str, Any]) -> None:
    """Print which machine it is, and when."""
    say(
        f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}, torch {machine['torch']}, "
        f"lightning-embcompress {machine['lightning_embcompress']}, {machine['date']}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "seconds" not in row:
        stored = "" if "parameter_bytes" not in row else f"{row['parameter_bytes'] / 1e6:,.2f}"
        return [row["name"], "", "", stored, "", "", "", "", row["note"]]
    peak, error, recall = row["peak_bytes"], row.get("error"), row.get("recall")
    return [
        row["name"],
        f"{row['seconds'] * 1e3:.3g}" if row["seconds"] < 0.1 else f"{row['seconds'] * 1e3:,.0f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        f"{row['parameter_bytes'] / 1e6:,.2f}",
        "" if peak is None else f"{peak / 1e6:,.1f}",
        "" if error is None else f"{error:.1e}",
        "" if row["bound_seconds"] is None else f"{row['bound_seconds'] * 1e3:.3g}",
        "" if row["times_bound"] is None else f"{row['times_bound']:.1f}",
        "" if recall is None else f"recall {recall:.3f}",
    ]


def show_scaling(report: Mapping[str, Any]) -> None:
    """Print what `run_scaling_bench` returned."""
    bench, tables = report["bench"], report["tables"]
    show_machine(report["machine"])
    sizes = [f"{table['vocab_size']:,}\n{table['stored_bytes'] / 1e6:,.2f} MB" for table in tables]
    for count in dict.fromkeys(line["threads"] for line in report["lines"]):
        screen = ScreenTable(
            "milliseconds",
            *sizes,
            "exponent\nof bytes",
            "ms a GB",
            title=f"{bench['method']}, width {bench['dim']:,}, {threads_of(count)}",
        )
        for line in report["lines"]:
            if line["threads"] != count:
                continue
            cells = [
                f"{point['seconds'] * 1e3:.3g}" if "seconds" in point else point["note"] for point in line["points"]
            ]
            slopes = ["", ""]
            if "exponent" in line:
                slopes = [f"{line['exponent']:.2f}", f"{line['seconds_per_gigabyte'] * 1e3:,.1f}"]
            screen.add_row(f"{title_of(line['what'], bench)}\n  {line['name']}", *cells, *slopes)
        print_table(screen)


def draw_speed(report: Mapping[str, Any]) -> Any:
    """Draw times against the bytes of the parameters, a part for each of what was measured.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    known = [row for row in report["rows"] if "seconds" in row]
    parts = list(dict.fromkeys((row["what"], row["threads"]) for row in known))
    figure, axes = _figure(len(parts))
    for one, (what, count) in zip(axes, parts, strict=True):
        rows = [row for row in known if (row["what"], row["threads"]) == (what, count)]
        for index, row in enumerate(rows):
            style = {"marker": _MARKERS[index // 10 % len(_MARKERS)], "color": f"C{index % 10}"}
            place = row["parameter_bytes"] / 1e6
            one.plot([place], [row["seconds"] * 1e3], linestyle="", label=row["name"], **style)
            if row["bound_seconds"] is not None:
                one.plot([place], [row["bound_seconds"] * 1e3], linestyle="", marker="_", color=style["color"])
        _finish(one, f"{title_of(what, report['bench'])}, {threads_of(count)} (_ at least)")
    return figure


def draw_scaling(report: Mapping[str, Any]) -> Any:
    """Draw times against stored bytes as the vocabulary grows, a part for each of what was measured.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    parts = list(dict.fromkeys((line["what"], line["threads"]) for line in report["lines"]))
    figure, axes = _figure(len(parts))
    for one, (what, count) in zip(axes, parts, strict=True):
        for line in report["lines"]:
            points = [
                (point["parameter_bytes"] / 1e6, point["seconds"] * 1e3)
                for point in line["points"]
                if "seconds" in point
            ]
            if (line["what"], line["threads"]) == (what, count) and points:
                label = line["name"] + (f", exponent {line['exponent']:.2f}" if "exponent" in line else "")
                one.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        _finish(one, f"{title_of(what, report['bench'])}, {threads_of(count)}")
    return figure


def title_of(what: str, bench: Mapping[str, Any]) -> str:
    """What is measured, in words.

    Example:
        >>> title_of("topk", {"k": 10, "states": 1, "ids": 2048, "tokens": 1024})
        'best 10 of 1 state'
    """
    states = f"{bench['states']:,} state{'s' if bench['states'] != 1 else ''}"
    return {
        "lookup": f"rows of {bench['ids']:,} ids",
        "lookup_backward": f"rows of {bench['ids']:,} ids, forward and backward",
        "logits": f"logits of {states}",
        "topk": f"best {bench['k']} of {states}",
        "sample": f"sample of {states}",
        "loss": f"loss of {bench['tokens']:,} tokens, forward and backward",
    }[what]


def threads_of(count: int) -> str:
    """A number of threads in words.

    Example:
        >>> threads_of(2)
        '2 threads'
    """
    return f"{count} thread{'s' if count != 1 else ''}"


def _figure(parts: int) -> tuple[Any, Sequence[Any]]:
    # Not pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    columns = min(3, max(1, parts))
    rows = -(-parts // columns)
    figure = Figure(figsize=(6 * columns, 4.5 * max(1, rows)), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(parts)]


def _finish(axes: Any, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xlabel="MB of parameters as stored", ylabel="milliseconds", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        # 1, 2, 5, 10, as numbers and not as powers.
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=6)
