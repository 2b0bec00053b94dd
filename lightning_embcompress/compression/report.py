"""What a person looks at: tables on the screen and `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table as ScreenTable
from torch import nn

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import TablePlan, plan_of
from lightning_embcompress.compression.tasks import Task
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.utils.files import explaining_failure, replacing
from lightning_embcompress.utils.progress import output_console


def table_report(model: nn.Module) -> list[dict[str, Any]]:
    """One mapping for every compressed table of a model, as in `report.json`."""
    parameters = {
        path: module.factorization.num_values
        for path, module in all_modules(model).items()
        if isinstance(module, CompressedLayer)
    }
    return [
        {
            "name": table.name,
            "modules": list(table.modules),
            "method": table.method,
            "shape": [table.spec["vocab_size"], table.spec["dim"]],
            "dtype": table.dtype,
            "dense_bytes": table.dense_bytes,
            "stored_bytes": table.stored_bytes,
            "ratio": table.ratio,
            "bits_per_weight": table.bits_per_weight,
            "parameter_ratio": table.spec["vocab_size"] * table.spec["dim"] / parameters[table.name],
            "weighted_error": table.weighted_error,
            "predicted_loss": table.predicted_loss,
            "structure": _structure(table),
        }
        for table in plan_of(model).tables
    ]


def write_report(
    path: Path, model: nn.Module, perplexity: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Write `report.json`: tables, model and perplexities. The file is replaced in one step.

    Values of a diverged run that are not finite become null: JSON has no infinity.

    Args:
        path: The file.
        model: The compressed model.
        perplexity: `dense`, `compressed`, `refined`, `final` and `split`.
        extra: Further keys, such as `token_counts`.
    """
    report = {"tables": table_report(model), "model": model_bytes(model), "perplexity": dict(perplexity)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with explaining_failure(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(report | dict(extra or {})), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@rank_zero_only
def show_tasks(tasks: Sequence[Task], budget: Budget | None = None, shares_budget: bool = False) -> None:
    """Print what the tables are now and how small they will be.

    Args:
        tasks: What is to become of which table.
        budget: That they were planned for; None where the config fixes the sizes.
        shares_budget: Whether only all tables together have a size.
    """
    columns = ("table", "method", "shape", "MB now", "MB at most", "ratio", "bits/\nweight")
    screen = ScreenTable(*columns, title="Tables to compress")
    for task in tasks:
        sizes = [""] * 3 if shares_budget else _most([task])
        now = f"{task.table.weight.nbytes / 1e6:.3f}"
        shape = _shape(task.table.shape, str(task.table.weight.dtype).removeprefix("torch."))
        screen.add_row(" = ".join(task.table.modules), task.config.method, shape, now, *sizes)
    if shares_budget:
        asked = _most(tasks)
        if budget is not None and budget.is_searched:
            asked = [f"perplexity {math.expm1(budget.max_loss):+.2%}", "", ""]
        screen.add_section()
        now = f"{sum(task.dense_bytes for task in tasks) / 1e6:.3f}"
        screen.add_row("all together", "", "", now, *asked)
    print_table(screen)


def _most(tasks: Sequence[Task]) -> list[str]:
    """Largest size, ratio and bits of tables together."""
    most, dense = (sum(sizes) for sizes in zip(*((task.max_bytes, task.dense_bytes) for task in tasks), strict=True))
    bits = 8 * most / sum(task.weights for task in tasks)
    return [f"{most / 1e6:.3f}", f"{dense / most:.2f}x", f"{bits:.2f}"]


@rank_zero_only
def show_plan(model: nn.Module, title: str) -> None:
    """Print what the tables have become."""
    entries = table_report(model)
    shown = {"weighted error": [_decimals(entry["weighted_error"]) for entry in entries] + [""]}
    if any(entry["predicted_loss"] is not None for entry in entries):
        total = plan_of(model).predicted_loss
        shown["predicted loss"] = [_decimals(loss) for loss in (*(one["predicted_loss"] for one in entries), total)]
    _show_compressed(title, entries, model_bytes(model), shown)


@rank_zero_only
def show_inspection(report: Mapping[str, Any]) -> None:
    """Print what `embcompress inspect` has found: tables, the whole model, and a note if there is one."""
    say(report["source"])
    shares = [f"{table['share']:.1%}" for table in report["tables"]] + [""]
    if report["compressed"]:
        _show_compressed("Compressed tables", report["tables"], report["model"], {"share": shares})
    else:
        screen = ScreenTable("table", "shape", "MB", "bits/\nweight", "share", title="Tables to compress")
        for table, share in zip(report["tables"], shares, strict=False):
            cells = _shape(table["shape"], table["dtype"]), _sizes(table)[1], f"{table['bits_per_weight']:g}"
            screen.add_row(" = ".join(table["modules"]), *cells, share)
        screen.add_section()
        whole = report["model"]
        screen.add_row("whole model", "", _sizes(whole)[1], f"{whole['bits_per_weight']:.2f}", "")
        print_table(screen)
    if report["note"]:
        say(f"No tables are chosen: {report['note']}")


def _show_compressed(
    title: str, entries: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], shown: Mapping[str, Sequence[str]]
) -> None:
    """Print entries of `table_report`, the whole model, and in further columns a cell for each of these lines."""
    columns = ("table", "method", "shape", "structure", "MB dense", "MB stored", "ratio", "bits/\nweight")
    screen = ScreenTable(*columns, *shown, title=title)
    *cells, last = zip(*shown.values(), strict=True)
    for entry, more in zip(entries, cells, strict=True):
        names, bits = " = ".join(entry["modules"]), f"{entry['bits_per_weight']:.2f}"
        stored = entry["structure"], *_sizes(entry), bits
        screen.add_row(names, entry["method"], _shape(entry["shape"], entry["dtype"]), *stored, *more)
    screen.add_section()
    screen.add_row("whole model", "", "", "", *_sizes(whole), f"{whole['bits_per_weight']:.2f}", *last)
    print_table(screen)


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _sizes(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{entry['dense_bytes'] / 1e6:.3f}", f"{entry['stored_bytes'] / 1e6:.3f}", f"{entry['ratio']:.2f}x"


@rank_zero_only
def say(text: str) -> None:
    """Print a line as it is, whatever its length and its brackets."""
    output_console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(screen: ScreenTable) -> None:
    """Print a table in the width of the terminal, or wide enough for a log file, which has none of its own."""
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(screen)


def _shape(shape: Sequence[int], dtype: str) -> str:
    """What ratios are against."""
    return f"{shape[0]:,} x {shape[1]:,}\n{dtype}"


def _structure(table: TablePlan) -> str:
    """Groups, ranks and bits in a few words, for any factorization."""
    quantization = table.spec.get("quantization")
    if quantization is None:
        return _factors(table.spec)
    state = "packed in" if quantization["state"] == "packed" else "training for"
    return f"{_factors(table.spec) or 'all numbers'}, {state} {quantization['bits']} bits"


def _factors(spec: Mapping[str, Any]) -> str:
    """Whatever a structure says beside the shape."""
    if isinstance(spec.get("segments"), list):
        ranks = [sum(count for _, count in runs) for runs in spec["segments"]]
        bits = sorted({abs(width) for runs in spec["segments"] for width, _ in runs if width})
        widths = f" in {bits[0]} to {bits[-1]} bits" if bits else ""
        windows = f", windows of {spec['window']} bits" if "window" in spec else ""
        return f"{len(spec['sizes'])} groups, ranks {_listed(ranks, ', ')}{widths}{windows}"
    if isinstance(spec.get("sizes"), list):
        return f"{len(spec['sizes'])} groups, ranks {_listed(spec['ranks'], ', ')}"
    modes = [_listed(spec[name], " x ") for name in ("vocab_shape", "dim_shape", "shape") if name in spec]
    known = {"kind", "vocab_size", "dim", "vocab_shape", "dim_shape", "shape"}
    rest = [
        f"{name.replace('_', ' ')} {_listed(value, ', ') if isinstance(value, list) else value}"
        for name, value in spec.items()
        if name not in known and isinstance(value, int | float | str | list)
    ]
    return ", ".join([" by ".join(modes)] * bool(modes) + rest)


def _listed(values: Sequence[Any], separator: str) -> str:
    # Twelve modes are what a vector of 4,096 is folded to: of more the end is of interest.
    shown = separator.join(map(str, values[:6]))
    return shown if len(values) <= 6 else f"{shown}{separator}... {values[-1]}"
