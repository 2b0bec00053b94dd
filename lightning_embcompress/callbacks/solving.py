"""Solving the tables of a model in training: within a limit, or again, with what has to be on the disk for that.

After compression every row lies in the span of its own block, so refining the factors alone would change nothing.
Refinement therefore aims at `T = Ŵ_now + R`: the table as training has moved it since, with the residual
`R = W − Ŵ` of its last decomposition put back.

What a callback keeps of every table that it has compressed is an entry, primitives only: `modules`, `max_bytes`,
`untied`, and where the residual is (`residual`, `checksum`; None where none was kept).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.evaluation import validation_perplexity
from lightning_embcompress.callbacks.replacing import replace_in_training, uninterrupted
from lightning_embcompress.callbacks.reporting import unmeasured
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.reference import write_reference
from lightning_embcompress.compression.search import search
from lightning_embcompress.compression.solution import Solution, solve
from lightning_embcompress.compression.tasks import Task, Tasks
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.tables.finding import Table, check_finite
from lightning_embcompress.utils.division import failing_together
from lightning_embcompress.utils.files import explaining_failure, replacing
from lightning_embcompress.utils.random_state import gather_over_processes


@dataclass
class Done:
    """What a callback has done in a run, as checkpoints keep it.

    Attributes:
        compressed: An entry of every table, none before they are compressed.
        refined: Epochs of refinements.
        token_counts: How often every token occurs, of all tables or by their names, where a refinement reads it again.
        statistics: Of the model, where a refinement reads them again.
        perplexity: For `report.json`.
        unmeasured: What was changed last and not measured yet: an interruption may come in between.
        settings: Budget and options by which tables were compressed; None before.
    """

    compressed: list[dict[str, Any]] = field(default_factory=list)
    refined: list[int] = field(default_factory=list)
    token_counts: Tensor | dict[str, Tensor] | None = None
    statistics: Statistics | None = None
    perplexity: dict[str, Any] = field(default_factory=unmeasured)
    unmeasured: str | None = None
    settings: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors: checkpoints are read with weights_only."""
        return deepcopy({**vars(self), "statistics": self.statistics and dict(vars(self.statistics))})

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Done:
        """Read what `to_dict` gave, of older checkpoints with fewer entries."""
        known = deepcopy(dict(state))
        statistics = known.pop("statistics", None)
        return cls(**known, statistics=statistics and Statistics(**statistics))


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
class Refined:
    """A table that was solved again; the model has its former factors yet.

    Attributes:
        entry: What is to be kept of the table.
        factors: What was found.
        in_place_of: The factorization of the model that takes its values, if the structure stayed.
    """

    entry: dict[str, Any]
    factors: Factorization[Any]
    in_place_of: Factorization[Any] | None = None


def search_in_training(
    trainer: Trainer, module: LightningModule, tasks: Tasks, budget: Budget, dense: float | None, monitor: str | None
) -> Solution:
    """Find the smallest tables within the growth of the perplexity that a budget allows; the model is not changed.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        tasks: The tables, with what each is worth.
        budget: With the limit.
        dense: Perplexity of the model as it is; None if it is not known.
        monitor: Name of the loss to measure it by, see `validation_perplexity`.

    Raises:
        ValueError: If the perplexity is not known, or no size is within the limit.
    """
    if dense is None or not math.isfinite(dense):
        raise ValueError(
            f"max_perplexity_increase={budget.max_perplexity_increase!r} needs the perplexity on the validation "
            f"data, and that of the model as it is is {'not known' if dense is None else dense}: name a logged "
            "loss in nats per token as monitor, or give another budget instead"
        )

    def perplexity(module: Any) -> float:
        value = validation_perplexity(trainer, module, monitor, "Perplexity, compressed")
        return math.inf if value is None else value

    # Handlers of signals may save at once; Ctrl-C raises, and everything is put back.
    held = partial(uninterrupted, also_by_ctrl_c=False)
    return search(module, tasks, budget, dense, perplexity, together=True, guard=held)


def keep_tables(solution: Solution, epoch: int, files: Files) -> list[dict[str, Any]]:
    """Keep on the disk what will be needed of tables that are solved; the model is not changed.

    Args:
        solution: What was found.
        epoch: Of the compression.
        files: Where residuals and references go.

    Returns:
        One entry a table.
    """
    entries = []
    for task, factors in zip(solution.tasks, solution.factors, strict=True):
        table = task.table
        entry: dict[str, Any] = {"modules": list(table.modules), "max_bytes": task.max_bytes}
        entry |= {"untied": task.untied, "residual": None, "checksum": None}
        if files.keeps_residual:
            entry |= _keep_residual(table, factors, epoch, files)
        with failing_together():
            if files.reference is not None and files.writes:
                write_reference(files.reference, table.name, table.weight)
        entries.append(entry)
    return entries


def solve_again(
    module: nn.Module,
    entries: Sequence[Mapping[str, Any]],
    config: MethodConfig,
    counts: Tensor | Mapping[str, Tensor] | None,
    epoch: int,
    files: Files,
    statistics: Statistics | None = None,
) -> list[Refined]:
    """Refine tables for what they are now with their residuals put back; the model is not changed.

    Args:
        module: The module that is training.
        entries: Of the tables.
        config: Of the method.
        counts: `[vocab_size]` token counts, or by the names of tables where they differ.
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
                residual = open_table(_find_residual(entry, own, files.resumed_from), own)
                if files.writes:
                    stack.callback(path.unlink, missing_ok=True)
                    write_table(path, residual, own, sign=1)
            # Written by this process, or by one that it has waited for.
            with failing_together():
                table = Table(tuple(entry["modules"]), open_table(path, own))
                check_finite(table)
            # Mapped by all: a killed process leaves nothing, where the system lets it go under their hands.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            own_counts = counts[table.name] if isinstance(counts, Mapping) else counts
            task = Task(table, config, entry["max_bytes"], entry["untied"], None, own_counts)
            task = task if statistics is None else task.weighed(module, statistics)
            table = replace(table, weight=table.weight.to(own.device))
            # A copy: the model changes when all tables are solved and their residuals are on the disk.
            tasks.append(replace(task, table=table, start=deepcopy(own)))
        solved = []
        found = solve(tasks, together=True).factors
        for entry, own, task, factors in zip(entries, owned, tasks, found, strict=True):
            # The residual before stays, for a run that is resumed from before this refinement.
            kept = {"residual": None, "checksum": None}
            if files.keeps_residual:
                kept = _keep_residual(task.table, factors, epoch, files)
            solved.append(Refined({**entry, **kept}, factors, own if factors is task.start else None))
        return solved


def put_refined(trainer: Trainer, module: LightningModule, tables: Sequence[Refined]) -> None:
    """Put what was found for tables in the place of their factors."""
    for table in tables:
        if table.in_place_of is None:
            replace_in_training(trainer, module, [(table.entry["modules"], table.factors)])
        else:
            # The optimizer goes on with the parameters it knows.
            table.in_place_of.load_state_dict(table.factors.state_dict())
            table.in_place_of.provenance = table.factors.provenance


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
            entry["residual"] = str(_find_residual(entry, own, resumed_from))


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


def _find_residual(entry: Mapping[str, Any], factorization: Factorization[Any], resumed_from: str | None) -> Path:
    """Find the residual of a table where it was written or, if its folder was moved, around the checkpoint.

    A run that was resumed has checkpoints in `lightning_logs/version_1/checkpoints` that need what was written to
    `lightning_logs/version_0/residuals`.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If none was kept, its size is not that of the table, or its checksum is another.
    """
    if entry["residual"] is None:
        raise ValueError(
            f"no residual of table {entry['modules'][0]!r} was kept, because no refinement was planned after the last "
            "one: resume with the refine_at_epochs that the run had, or use keep_reference in the first place"
        )
    path = Path(entry["residual"])
    folders = list(Path(resumed_from).absolute().parents)[:4] if resumed_from else []
    ends = [Path(*path.parts[-count:]) for count in (3, 4, 5)]
    vocab_size, dim = factorization.vocab_size, factorization.dim
    size = vocab_size * dim * factorization.dtype.itemsize
    checksums = entry["checksum"]
    # A number alone: of older checkpoints.
    known = [checksums] if isinstance(checksums, int) else checksums
    others = []
    for place in dict.fromkeys([path, *(folder / end for end in ends for folder in folders)]):
        if not place.is_file():
            continue
        if place.stat().st_size == size and (known is None or _checksum(place) in known):
            return place
        others.append(place)
    if others:
        raise ValueError(
            f"the residual {str(others[0])!r} is not the one that was written for this checkpoint ({size} bytes of a "
            f"table of {vocab_size} x {dim}): it is damaged, or another run wrote to the same folder. Put it back, or "
            "resume without refine_at_epochs"
        )
    raise FileNotFoundError(
        f"the residual {str(path)!r} is missing: it was written when the table was compressed, and refinement "
        "needs it. Put it back, or resume without refine_at_epochs"
    )


def _keep_residual(table: Table, factors: Factorization[Any], epoch: int, files: Files) -> dict[str, Any]:
    path = files.folder / f"{table.name}-epoch{epoch}.bin"
    checksum = None
    with failing_together():
        if files.writes:
            checksum = write_table(path, table.weight, factors, sign=-1)
    # Of every machine its own: the same values may be rounded otherwise there.
    checksums = {found for found in gather_over_processes(checksum) if found is not None}
    return {"residual": str(path), "checksum": sorted(checksums)}


def open_table(path: Path, factorization: Factorization[Any]) -> Tensor:
    """Map a file that `write_table` wrote into memory: `[vocab_size, dim]` in the dtype of the factors."""
    shape = (factorization.vocab_size, factorization.dim)
    return torch.from_file(str(path), size=shape[0] * shape[1], dtype=factorization.dtype).view(shape)


@torch.no_grad()
def write_table(path: Path, base: Tensor, factorization: Factorization[Any], sign: int) -> int:
    """Write the residual `W − Ŵ` of a table, or the target `Ŵ + R` of a refinement, chunk by chunk in its dtype.

    Args:
        path: A file that was there is replaced in one step.
        base: `W` or `R`, `[vocab_size, dim]`.
        factorization: Of `Ŵ`.
        sign: -1 for the residual, 1 for the target.

    Returns:
        The checksum by which the file is known again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    device = factorization.device
    checksum = 0
    with explaining_failure(path), replacing(path) as temporary, temporary.open("wb") as file:
        for chunk in row_chunks(factorization.vocab_size, factorization.dim):
            rows = factorization.rows(torch.arange(chunk.start, chunk.stop, device=device))
            values = base[chunk].to(device).float() if rows.dtype.itemsize < 4 else base[chunk].to(device)
            values = (values + sign * rows).to(rows.dtype).cpu().contiguous()
            # By bytes: numpy has no bfloat16.
            data = values.view(torch.uint8).numpy().tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
    return checksum


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value
