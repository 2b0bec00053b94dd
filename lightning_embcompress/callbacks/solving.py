"""Solving the tables of a model in training, with what has to be on the disk before the model is changed.

What a callback keeps of every table that it has compressed is an entry, primitives only: `modules`, `max_bytes`,
`untied`, and where the residual is (`residual`, `checksum`; None where none was kept).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.residual import find_table, open_table, places_of, write_residual, write_target
from lightning_embcompress.compression.reference import write_reference
from lightning_embcompress.compression.solution import Solution, solve
from lightning_embcompress.compression.tasks import Task
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.tables.replacement import Table, check_finite
from lightning_embcompress.utils.division import failing_together
from lightning_embcompress.utils.random_state import gather_over_processes


@dataclass(frozen=True)
class Files:
    """Where a run keeps what compression leaves out.

    Attributes:
        folder: Where residuals are written.
        writes: Whether this process writes there.
        keeps_residual: Whether another refinement may need them.
        resumed_from: Checkpoint that training goes on from.
        reference: Folder of the dense tables, or None.
    """

    folder: Path
    writes: bool
    keeps_residual: bool
    resumed_from: str | None
    reference: Path | None


@dataclass(frozen=True)
class Solved:
    """Factors that are not in the model yet.

    Attributes:
        entry: What is to be kept of the table.
        factors: What was found.
        in_place_of: The factorization of the model that takes its values, if the structure stayed.
    """

    entry: dict[str, Any]
    factors: Factorization[Any]
    in_place_of: Factorization[Any] | None = None


def keep_tables(solution: Solution, epoch: int, files: Files) -> list[Solved]:
    """Keep on the disk what will be needed of tables that are solved; the model is not changed.

    Args:
        solution: What was found.
        epoch: Of the compression.
        files: Where residuals and references go.
    """
    solved = []
    for task, factors in zip(solution.tasks, solution.factors, strict=True):
        table = task.table
        entry: dict[str, Any] = {"modules": list(table.modules), "max_bytes": task.max_bytes}
        entry |= {"untied": task.untied, "residual": None, "checksum": None}
        if files.keeps_residual:
            entry |= _keep_residual(table, factors, epoch, files)
        with failing_together():
            if files.reference is not None and files.writes:
                write_reference(files.reference, table.name, table.weight)
        solved.append(Solved(entry, factors))
    return solved


def solve_again(
    module: nn.Module,
    entries: Sequence[Mapping[str, Any]],
    config: MethodConfig,
    counts: Tensor | None,
    epoch: int,
    files: Files,
    statistics: Statistics | None = None,
) -> list[Solved]:
    """Refine tables for what they are now with their residuals put back; the model is not changed.

    Args:
        module: The module that is training.
        entries: Of the tables.
        config: Of the method.
        counts: `[vocab_size]` token counts.
        epoch: Of the refinement.
        files: Where residuals are and go.
        statistics: Of the module, where errors are weighed by what the loss grows by.
    """
    owned = [factorization_of(module, entry) for entry in entries]
    with ExitStack() as stack:
        tasks = []
        for entry, own in zip(entries, owned, strict=True):
            # Not the name of a residual: one of this epoch may be there, which a later checkpoint needs.
            path = files.folder / f"{entry['modules'][0]}-epoch{epoch}.target"
            with failing_together():
                residual = open_table(_places(entry, files.resumed_from), own, entry["checksum"])
                if files.writes:
                    stack.callback(path.unlink, missing_ok=True)
                    write_target(path, residual, own)
            # Written by this process, or by one that it has waited for.
            with failing_together():
                table = Table(tuple(entry["modules"]), open_table(path, own))
                check_finite(table)
            # Mapped by all: a killed process leaves nothing, where the system lets it go under their hands.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            metric = None if statistics is None else metric_of(module, table, statistics)
            table = replace(table, weight=table.weight.to(own.device))
            # A copy: the model changes when all tables are solved and their residuals are on the disk.
            tasks.append(Task(table, config, entry["max_bytes"], entry["untied"], metric, counts, start=deepcopy(own)))
        solved = []
        found = solve(tasks, together=True).factors
        for entry, own, task, factors in zip(entries, owned, tasks, found, strict=True):
            # The residual before stays, for a run that is resumed from before this refinement.
            kept = {"residual": None, "checksum": None}
            if files.keeps_residual:
                kept = _keep_residual(task.table, factors, epoch, files)
            solved.append(Solved({**entry, **kept}, factors, own if factors is task.start else None))
        return solved


def check_residuals(
    module: nn.Module, entries: Sequence[dict[str, Any]], config: MethodConfig, resumed_from: str | None
) -> None:
    """Refuse to go on towards a refinement that cannot be done, and note where the residuals are now.

    Checkpoints from here on may be anywhere: they have to know where a folder was moved to.

    Raises:
        FileNotFoundError: If a residual is missing.
        ValueError: If a residual is damaged or none was kept, or a table is not compressed any more, or by another
            method.
    """
    kinds = {kind for one in config.candidates for kind in get_method(one.method).kinds}
    with failing_together():
        for entry in entries:
            own = factorization_of(module, entry)
            if own.kind not in kinds:
                method = own.provenance.get("method", own.kind)
                raise ValueError(
                    f"table {entry['modules'][0]!r} was compressed by {method!r} and cannot be refined by "
                    f"{config.method!r}: use a callback of method {method!r}, or resume without refine_at_epochs"
                )
            entry["residual"] = str(find_table(_places(entry, resumed_from), own, entry["checksum"]))


def factorization_of(module: nn.Module, entry: Mapping[str, Any]) -> Factorization[Any]:
    """What a table that was compressed is stored as now.

    Raises:
        ValueError: If it is not compressed any more.
    """
    name = entry["modules"][0]
    layer = module.get_submodule(name)
    if not isinstance(layer, CompressedLayer):
        raise ValueError(
            f"table {name!r} was compressed, but is a {type(layer).__name__} now: it was replaced by other code and "
            "cannot be refined"
        )
    if layer.factorization.is_prepared or layer.factorization.quantization is not None:
        raise ValueError(
            f"table {name!r} was quantized after it was compressed, and cannot be refined any more: refine before"
        )
    return layer.factorization


def _places(entry: Mapping[str, Any], resumed_from: str | None) -> list[Path]:
    if entry["residual"] is None:
        raise ValueError(
            f"no residual of table {entry['modules'][0]!r} was kept, because no refinement was planned after the last "
            "one: resume with the refine_at_epochs that the run had, or use keep_reference in the first place"
        )
    return places_of(Path(entry["residual"]), resumed_from)


def _keep_residual(table: Table, factors: Factorization[Any], epoch: int, files: Files) -> dict[str, Any]:
    path = files.folder / f"{table.name}-epoch{epoch}.bin"
    checksum = None
    with failing_together():
        if files.writes:
            checksum = write_residual(path, table.weight, factors)
    # Of every machine its own: the same values may be rounded otherwise there.
    checksums = {found for found in gather_over_processes(checksum) if found is not None}
    return {"residual": str(path), "checksum": sorted(checksums)}
