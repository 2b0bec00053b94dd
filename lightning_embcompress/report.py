"""What a person looks at: tables on the screen and `report.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table as ScreenTable
from torch import nn

from lightning_embcompress.budget import Request
from lightning_embcompress.layers import CompressedLayer
from lightning_embcompress.plan import Plan, TablePlan, model_bytes, plan_of
from lightning_embcompress.tables import all_modules


def table_report(model: nn.Module) -> list[dict[str, Any]]:
    """One mapping for every compressed table of a model, as in `report.json`."""
    parameters = {
        path: sum(parameter.numel() for parameter in module.factorization.parameters())
        for path, module in all_modules(model).items()
        if isinstance(module, CompressedLayer)
    }
    return [
        {
            "name": table.name,
            "modules": list(table.modules),
            "method": table.method,
            "shape": [table.spec["vocab_size"], table.spec["dim"]],
            "dense_bytes": table.dense_bytes,
            "stored_bytes": table.stored_bytes,
            "ratio": table.ratio,
            "parameter_ratio": table.spec["vocab_size"] * table.spec["dim"] / parameters[table.name],
            "weighted_error": table.weighted_error,
            "structure": _structure(table),
        }
        for table in plan_of(model).tables
    ]


def write_report(path: Path, model: nn.Module, perplexity: Mapping[str, Any]) -> None:
    """Write `report.json`: tables, model and perplexities. The file is replaced in one step.

    Values of a diverged run that are not finite become null: JSON has no infinity.
    """
    report = _finite({"tables": table_report(model), "model": model_bytes(model), "perplexity": dict(perplexity)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@rank_zero_only
def show_requests(requests: Sequence[Request]) -> None:
    """Print what the tables are now and how small they will be."""
    screen = ScreenTable("table", "method", "shape", "MB now", "MB at most", "ratio", title="Tables to compress")
    for request in requests:
        now = request.table.weight.nbytes
        screen.add_row(
            " = ".join(request.table.modules),
            request.method_name,
            _shape(request.table.shape),
            f"{now / 1e6:.3f}",
            f"{request.max_bytes / 1e6:.3f}",
            f"{now / request.max_bytes:.2f}x",
        )
    _print(screen)


@rank_zero_only
def show_plan(plan: Plan, model: nn.Module, title: str) -> None:
    """Print what the tables have become."""
    screen = ScreenTable(
        "table", "method", "shape", "structure", "MB dense", "MB stored", "ratio", "weighted error", title=title
    )
    for table in plan.tables:
        screen.add_row(
            " = ".join(table.modules),
            table.method,
            _shape((table.spec["vocab_size"], table.spec["dim"])),
            _structure(table),
            f"{table.dense_bytes / 1e6:.3f}",
            f"{table.stored_bytes / 1e6:.3f}",
            f"{table.ratio:.2f}x",
            "" if table.weighted_error is None else f"{table.weighted_error:.4f}",
        )
    whole = model_bytes(model)
    screen.add_section()
    screen.add_row(
        "whole model",
        "",
        "",
        "",
        f"{whole['dense_bytes'] / 1e6:.3f}",
        f"{whole['stored_bytes'] / 1e6:.3f}",
        f"{whole['ratio']:.2f}x",
        "",
    )
    _print(screen)


def _print(screen: ScreenTable) -> None:
    console = Console()
    # A log file has no width of its own, and 80 columns would break the rows.
    (console if console.is_terminal else Console(width=132)).print(screen)


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} x {shape[1]:,}"


def _structure(table: TablePlan) -> str:
    """Groups and ranks in a few words, for any factorization: whatever its structure says beside the shape."""
    ranks = table.spec.get("ranks", table.spec.get("rank"))
    if isinstance(ranks, list):
        shown = ", ".join(map(str, ranks[:6])) + (f", ... {ranks[-1]}" if len(ranks) > 6 else "")
        return f"{len(ranks)} groups, ranks {shown}"
    return f"rank {ranks}" if ranks is not None else ""
