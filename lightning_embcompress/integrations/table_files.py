"""Tables in files that are larger than the memory, compressed from file to file without a model."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import Plan, TablePlan
from lightning_embcompress.integrations.contents import sha256
from lightning_embcompress.integrations.sources import CONFIG_FILE, INDEX_FILE, SAVED_FORMAT, WEIGHTS_FILE
from lightning_embcompress.integrations.written_tables import JOURNAL, Journal, WrittenTable
from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.gram import row_windows
from lightning_embcompress.methods.registry import (
    METHODS,
    Factorization,
    FullTable,
    Quantization,
    factorization_from_spec,
    get_method,
)
from lightning_embcompress.methods.specs import dense_bytes
from lightning_embcompress.tables.finding import check_rows_finite
from lightning_embcompress.utils.chunk_sums import SUFFIX, ChunkSums
from lightning_embcompress.utils.files import explaining_failure, put_in_place, read_json, synchronize
from lightning_embcompress.utils.progress import progress_bar, say_line
from lightning_embcompress.utils.tensor_files import TensorFile, TensorOnDisk

# Between two notes of how far it is.
_SECONDS_BETWEEN_NOTES = 2.0


@dataclass(frozen=True)
class TableSource:
    """A table in a file.

    Attributes:
        name: What it is called where it goes: the path of the module whose weight it is.
        table: Its numbers.
        counts: `[rows]` how often each occurs; None for equally often.
    """

    name: str
    table: TensorOnDisk
    counts: Tensor | None = None

    def record(self) -> dict[str, Any]:
        """Which it is, and as of when, as JSON."""
        file = self.table.file
        found = os.stat(file.path)
        counts = None if self.counts is None else [len(self.counts), float(self.counts.double().sum())]
        place = [str(file.path.resolve()), found.st_size, found.st_mtime_ns, self.table.entry.start]
        return {"name": self.name, "file": place, "counts": counts}


def find_table(said: str) -> tuple[str, TensorOnDisk]:
    """Find a table by `FILE` or `FILE:TENSOR`.

    Args:
        said: A file of safetensors, the index of a model in several (`model.safetensors.index.json`) or its directory,
            or an array of NumPy; and, where there is more than one matrix, which tensor.

    Returns:
        The name of the tensor, none of an array, and the table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, has no such tensor, or several that may be meant.
    """
    place, _, name = (said, "", "") if Path(said).expanduser().exists() else said.rpartition(":")
    path = Path(place or said).expanduser()
    if path.is_dir():
        path = next((path / one for one in (WEIGHTS_FILE, INDEX_FILE) if (path / one).is_file()), path / WEIGHTS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: name it as FILE or FILE:TENSOR")
    if path.name.endswith(".index.json"):
        return _in_shards(path, name)
    if path.suffix not in (".safetensors", ".npy"):
        raise ValueError(
            f"{str(path)!r} can only be read as a whole: give a file of safetensors (.safetensors) or an array of "
            "NumPy (.npy), as safetensors.torch.save_file and numpy.save write them"
        )
    file = TensorFile(path)
    name = name or _only_matrix(str(path), {own: entry.shape for own, entry in file.entries.items()})
    return name, _checked(file[name], said)


def _in_shards(index: Path, name: str) -> tuple[str, TensorOnDisk]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{str(index)!r} is damaged: 'weight_map' is {str(shards)[:60]!r}")
    if not name:
        files = {file: TensorFile(index.parent / str(file)) for file in sorted(set(shards.values()))}
        name = _only_matrix(str(index), {one: files[shards[one]].entries[one].shape for one in shards})
    if name not in shards:
        raise ValueError(f"{str(index)!r} has no tensor {name!r}; it has {', '.join(map(repr, list(shards)[:6]))}")
    return name, _checked(TensorFile(index.parent / str(shards[name]))[name], f"{index}:{name}")


def _only_matrix(where: str, shapes: Mapping[str, torch.Size]) -> str:
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    if len(matrices) == 1:
        return next(iter(matrices))
    largest = sorted(matrices, key=lambda name: -matrices[name].numel())[:4]
    listed = ", ".join(f"{name!r} {tuple(matrices[name])}" for name in largest) or "none"
    raise ValueError(f"{where!r} has {len(matrices)} matrices ({listed}): name one of them, as FILE:TENSOR")


def _checked(table: TensorOnDisk, said: str) -> TensorOnDisk:
    if len(table.shape) != 2 or 0 in table.shape or not table.dtype.is_floating_point:
        raise ValueError(f"{said!r} is {table.dtype} of shape {tuple(table.shape)}: a table is a matrix of floats")
    return table


def compress_tables(
    sources: Sequence[TableSource],
    out: Path,
    config: MethodConfig | Quantization,
    budget: Budget | None,
) -> Plan:
    """Compress tables from file to file, in memory that does not grow with their rows but for some 40 bytes each.

    What is written is a directory as of `save_compressed`, with the tables alone, and the checksums by which their rows
    are read from disk; `load_compressed` reads it. It has its name when it is whole. Interrupted, and started again
    with the same arguments, it goes on where it was, with the last windows of rows that were written.

    Args:
        sources: The tables.
        out: A directory that does not exist, or is empty; or is replaced when it is whole.
        config: Of a method that streams, or how the numbers themselves are quantized.
        budget: How small each table is to become; None for a quantization, which says it.

    Returns:
        The plan of the tables.

    Raises:
        ValueError: If a table cannot be compressed so. Nothing has been written then.
        OSError: If a file cannot be written.
    """
    if isinstance(config, MethodConfig) and not get_method(config.method).factorization.streams:
        streaming = [name for name, one in METHODS.items() if one.factorization.streams]
        raise ValueError(
            f"method {config.method!r} needs the whole table in memory: take one of {', '.join(streaming)}, or integers"
        )
    for source in sources:
        _check_counts(source)
        with progress_bar(f"Reading {source.name}", total=None):
            check_rows_finite(source.name, source.table)
    work = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is writing {str(out)!r}: wait for it, or choose another") from error
        with explaining_failure(out):
            plan = _write_all(sources, work, config, budget)
            _finish(plan, work, len(sources))
            (work / "lock").unlink()
            put_in_place(out.absolute(), work)
            synchronize(out.absolute().parent)
    return plan


def _write_all(
    sources: Sequence[TableSource], work: Path, config: MethodConfig | Quantization, budget: Budget | None
) -> Plan:
    request = {
        "tables": [source.record() for source in sources],
        "config": repr(config),
        "budget": None if budget is None else budget.given,
    }
    journal = Journal.read(work, request)
    total = sum(source.table.entry.nbytes for source in sources)
    tables = []
    for index, source in enumerate(sources):
        file = work / _shard(index, len(sources))
        noted = journal.tables.get(source.name)
        if noted is None:
            start = 0
            factors = _outlined(source, config, budget, total)
            written = WrittenTable.create(file, source.name, factors)
            noted = {"spec": factors.spec(), "filled": 0, "plan": _plan_of(source, factors, config)}
            journal.note(source.name, noted)
        else:
            start = noted["filled"]
            say_line(f"Going on with {source.name} at row {start:,} of {source.table.shape[0]:,}")
            empty = factorization_from_spec(noted["spec"], source.table.dtype, torch.device("meta"))
            factors, written = empty, WrittenTable.open(file, source.name, empty)
        if start < source.table.shape[0]:
            fill = factors.filling(_problem(source, config, budget, total))
            _fill(source, factors, fill, written, start, partial(journal.filled, source.name))
        written.close()
        tables.append(TablePlan(**{**noted["plan"], "modules": tuple(noted["plan"]["modules"])}))
    return Plan(tuple(tables))


def _problem(
    source: TableSource,
    config: MethodConfig | Quantization,
    budget: Budget | None,
    total: int,
    advance: Callable[[float], None] = lambda _: None,
) -> Problem[Any]:
    table = source.table
    # Solvers that stream read it by rows alone, as they would a tensor.
    weight = cast(Tensor, table)
    if isinstance(config, Quantization) or budget is None:
        return Problem(weight, 0, source.counts, MethodConfig(), advance, None)
    dense = dense_bytes(table.shape[0], table.shape[1], table.element_size())
    most = budget.bytes_of(dense, table.shape.numel(), total)
    return Problem(weight, most, source.counts, config, advance, None)


def _outlined(
    source: TableSource, config: MethodConfig | Quantization, budget: Budget | None, total: int
) -> Factorization[Any]:
    rows, columns = source.table.shape
    if isinstance(config, Quantization):
        packed = FullTable(rows, columns, source.table.dtype, torch.device("meta"))
        packed.hold(config, "packed")
        return packed
    with progress_bar(f"Solving {source.name} ({rows:,} x {columns})", total=1.0) as advance:
        return get_method(config.method).factorization.outline(_problem(source, config, budget, total, advance))


def _fill(
    source: TableSource,
    factors: Factorization[Any],
    fill: Callable[[slice], None],
    written: WrittenTable,
    start: int,
    note: Callable[[int], None],
) -> None:
    rows, columns = source.table.shape
    noted = time.monotonic()
    with progress_bar(f"Writing {source.name}", total=float(rows), unit="rows") as advance:
        advance(start)
        for window in row_windows(rows, columns, factors.window_multiple):
            if window.stop <= start:
                continue
            fill(window)
            written.release()
            advance(window.stop - window.start)
            if window.stop == rows or time.monotonic() - noted > _SECONDS_BETWEEN_NOTES:
                # On the disk before it is noted that it is there.
                written.flush()
                note(window.stop)
                noted = time.monotonic()


def _plan_of(source: TableSource, factors: Factorization[Any], config: MethodConfig | Quantization) -> dict[str, Any]:
    method, options = (config.method, config.options) if isinstance(config, MethodConfig) else (factors.kind, {})
    return {
        "modules": [source.name],
        "method": method,
        "options": options,
        "spec": factors.spec(),
        "dtype": str(factors.dtype).removeprefix("torch."),
        "stored_bytes": factors.stored_bytes(),
        "weighted_error": None,
    }


def _finish(plan: Plan, work: Path, shards: int) -> None:
    """Write what goes with the tables."""
    files = [_shard(index, shards) for index in range(shards)]
    for file in files:
        with progress_bar(f"Checksums of {file}", total=None):
            ChunkSums.of(work / file).save(work / f"{file}{SUFFIX}")
    if shards > 1:
        named = {name: file for file in files for name in TensorFile(work / file).entries}
        (work / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": named}), encoding="utf-8")
    record = {
        "format": SAVED_FORMAT,
        "plan": plan.to_dict(),
        "aliases": {},
        "has_tables_only": True,
        "sha256": {file: sha256(work / file) for file in files},
    }
    (work / CONFIG_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (work / JOURNAL).unlink()
    for path in (*work.iterdir(), work):
        synchronize(path)


def _shard(index: int, count: int) -> str:
    return WEIGHTS_FILE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _check_counts(source: TableSource) -> None:
    counts, rows = source.counts, source.table.shape[0]
    if counts is None:
        return
    if counts.shape != (rows,):
        raise ValueError(f"counts of {source.name!r} have the shape {tuple(counts.shape)}, the table has {rows} rows")
    if not bool((counts >= 0).all()) or not bool(counts.double().isfinite().all()):
        raise ValueError(f"counts of {source.name!r} must be numbers that are not negative")
