"""GGUF: the token table and the output table of a file of llama.cpp anew, everything else byte for byte."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_embcompress.calibration.loss_metric import metric_of_moments
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.budget import parse_perplexity_increase
from lightning_embcompress.integrations.export.gguf_file import GgufFile
from lightning_embcompress.integrations.export.written import WrittenTable, fit_table
from lightning_embcompress.methods.numerics.grid_rounding import GridCodes
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.grids import Grid
from lightning_embcompress.tables.finding import Table

_BLOCK = 32
# As ggml-common.h has them.
_IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GRIDS: dict[str, Grid] = {
    "IQ4_NL": Grid(_IQ4_NL_LEVELS, _BLOCK),
    "Q4_0": Grid(tuple(range(-8, 8)), _BLOCK),
    "Q4_1": Grid(tuple(range(16)), _BLOCK, has_minimum=True),
    "Q5_0": Grid(tuple(range(-16, 16)), _BLOCK),
    "Q5_1": Grid(tuple(range(32)), _BLOCK, has_minimum=True),
    "Q8_0": Grid(tuple(range(-128, 128)), _BLOCK),
}
"""Types that tables can be written in, by their bits; of equal bits the one that loses less comes first."""
TOKEN_TABLE, OUTPUT_TABLE = "token_embd.weight", "output.weight"
_TABLES = (TOKEN_TABLE, OUTPUT_TABLE)
# Part of the squared values in which a table of the same model may differ: those of 3 bits do in less.
_SAME = 0.3


def export_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "auto",
    statistics: Statistics | None = None,
    *,
    tables: Mapping[str, Tensor] | None = None,
    token_counts: Tensor | None = None,
    max_perplexity_increase: str | float | None = None,
) -> list[WrittenTable]:
    """Write a GGUF file with its token table and output table in another type, found in the metric of the loss.

    Codes, scales and minimums follow from `fit_grid`; of a table that embedding and head share, from what errors cost
    in both. All metadata and all other tensors stay as they are, byte for byte.

    Args:
        source: A GGUF file of any architecture whose tables are `token_embd.weight` and, where it is not tied,
            `output.weight`.
        target: The file to write; one that is there is replaced when the new one is complete.
        type: One of `IQ4_NL`, `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1` and `Q8_0`; `auto` for the first of these that is
            predicted to stay within `max_perplexity_increase`.
        statistics: Of the model, see `collect_statistics`; the embedding's gradients are those of the token table, the
            head's hidden states those of the output table. Without them all columns count the same.
        tables: Values by the name of a tensor, from a better source than the file, such as the model before it was
            quantized.
        token_counts: `[vocab_size]` by which rows count in the prediction; None for those of the statistics.
        max_perplexity_increase: For `auto`: `"1%"` or 0.01.

    Raises:
        ValueError: If the file is none, is damaged or cannot be read, a table does not fit the type, the statistics or
            the values, or no type is within the limit. Nothing is written then.
        ImportError: If the package gguf is not there.
        OSError: If the file cannot be written; what was there before is as it was.
    """
    file = GgufFile.open(source)
    names = [name for name in _TABLES if name in file.tensors]
    if TOKEN_TABLE not in names:
        raise ValueError(
            f"{str(source)!r} has no tensor {TOKEN_TABLE!r}: the architecture {file.architecture!r} keeps its tokens "
            "elsewhere, or the file is a part of a model"
        )
    kinds = _wanted_types(type, statistics, max_perplexity_increase)
    limit = math.inf if max_perplexity_increase is None else parse_perplexity_increase(max_perplexity_increase)
    found = [
        _Table.read(file, name, len(names) == 1, statistics, (tables or {}).get(name), token_counts) for name in names
    ]
    for table in found:
        table.check(kinds)
    written, packed = _fit(file, found, kinds, limit)
    file.write(Path(target), packed)
    return written


def pack(found: GridCodes, type: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a table, `[rows, bytes]`, as ggml lays them out: blocks of 32 values after their scale.

    Args:
        found: A table in the grid of the type.
        type: One of `GRIDS`.
    """
    rows, columns = found.codes.shape
    codes = found.codes.cpu().numpy().reshape(rows, -1, _BLOCK)
    parts = [_halves(found.scales)]
    if found.minimums is not None:
        parts.append(_halves(found.minimums))
    if type == "Q8_0":
        # From -128: the highest bit turned.
        parts.append(codes ^ np.uint8(128))
    else:
        if len(GRIDS[type].levels) > 16:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & np.uint8(15)
        parts.append(low[..., : _BLOCK // 2] | low[..., _BLOCK // 2 :] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _halves(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    halves = values.cpu().numpy().astype("<f2")
    return halves.view(np.uint8).reshape(*halves.shape, 2)


@dataclass(frozen=True)
class _Table:
    """A table of a file.

    Attributes:
        name: Of the tensor.
        before: Type that it has.
        values: `[vocab_size, dim]` float32.
        is_given: Whether they are from another source than the file.
        metric: What an error costs; None without statistics.
    """

    name: str
    before: str
    values: Tensor
    is_given: bool
    metric: Metric | None

    @classmethod
    def read(
        cls,
        file: GgufFile,
        name: str,
        is_tied: bool,
        statistics: Statistics | None,
        given: Tensor | None,
        token_counts: Tensor | None,
    ) -> _Table:
        before = file.type_of(name)
        rows, columns = file.shape_of(name)
        if given is None:
            values = torch.from_numpy(file.values(name))
        else:
            values = given.detach().float().cpu()
            _check_same(file, name, values)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name!r} has values that are not finite, and cannot be quantized")
        if statistics is None:
            return cls(name, before, values, given is not None, None)
        # A bias stays what it is, and does not make up for errors at the mean state.
        table = Table(_paths(statistics, name, is_tied, (rows, columns)), values)
        metric = metric_of_moments(table, statistics, token_counts=token_counts)
        return cls(name, before, values, given is not None, metric)

    def check(self, kinds: Sequence[str]) -> None:
        """Check that the table has a place in some types."""
        columns = self.values.shape[1]
        if columns % _BLOCK:
            raise ValueError(
                f"type {kinds[0]} keeps blocks of {_BLOCK} values, and rows of {self.name!r} have {columns}: of such "
                f"a table llama.cpp reads F16, BF16 and F32 alone; it is {self.before}"
            )


def _check_same(file: GgufFile, name: str, values: Tensor) -> None:
    """Check that values are those of the same table, but for what its type has lost.

    Raises:
        ValueError: If they are not.
    """
    shape = file.shape_of(name)
    if tuple(values.shape) != shape:
        raise ValueError(
            f"tables[{name!r}] has the shape {tuple(values.shape)}, and the file's has {shape}: they are of different "
            "models"
        )
    try:
        there = torch.from_numpy(file.values(name))
    except ValueError:
        # A type that cannot be read: that is what the values are for.
        return
    if float((there - values).square().sum()) > _SAME * float(values.square().sum()):
        raise ValueError(
            f"tables[{name!r}] differs from the file's in more than {_SAME:.0%} of its squared values: they are of "
            "different models, or of different steps of training"
        )


def _paths(statistics: Statistics, name: str, is_tied: bool, shape: tuple[int, int]) -> tuple[str, ...]:
    """The modules of the statistics that read a table."""
    inputs = [path for path, moment in statistics.gradients.items() if len(moment) == shape[1]]
    heads = [path for path, moment in statistics.hidden.items() if len(moment) == shape[1]]
    wanted = [*inputs, *heads] if is_tied else inputs if name == TOKEN_TABLE else heads
    found = tuple(path for path in dict.fromkeys(wanted) if len(statistics.counts_of([path])) == shape[0])
    if not found:
        role = "heads" if name == OUTPUT_TABLE else "embeddings"
        raise ValueError(
            f"statistics: none of their {role} has the {shape[0]} tokens and {shape[1]} columns of {name!r}: they are "
            "of another model"
        )
    return found


def _wanted_types(type: str, statistics: Statistics | None, limit: str | float | None) -> list[str]:
    """The types to try, in turn."""
    if type == "auto":
        if limit is None:
            raise ValueError("max_perplexity_increase is missing: type 'auto' is the smallest within it")
        if statistics is None:
            raise ValueError("statistics are needed for type 'auto': without them nothing is predicted")
        return list(GRIDS)
    if limit is not None:
        raise ValueError(f"max_perplexity_increase is for type 'auto', and type is {type!r}")
    if type not in GRIDS:
        raise ValueError(f"type must be one of {', '.join(GRIDS)} or auto, it is {type!r}")
    return [type]


def _fit(
    file: GgufFile, tables: Sequence[_Table], kinds: Sequence[str], limit: float
) -> tuple[list[WrittenTable], dict[str, tuple[str, np.ndarray[Any, Any]]]]:
    """Tables in the first type that is predicted to lose no more nats than a limit, and their bytes."""
    said = ""
    for kind in kinds:
        written, packed = [], {}
        for table in tables:
            if table.before == kind and not table.is_given:
                # Nothing is lost by what is there.
                predicted = None if table.metric is None else 0.0
                bits = 8 * file.tensors[table.name].n_bytes / table.values.numel()
                written.append(WrittenTable(table.name, file.shape_of(table.name), kind, kind, bits, predicted, 0.0))
                continue
            one, codes = fit_table(table.name, table.values, table.before, kind, GRIDS[kind], table.metric)
            written.append(one)
            packed[table.name] = (kind, pack(codes, kind))
        lost = sum(one.predicted_loss or 0.0 for one in written)
        if lost <= limit:
            return written, packed
        said = f"{kind} is predicted to take {math.expm1(lost):.2%}"
    raise ValueError(f"max_perplexity_increase {math.expm1(limit):.2%} is below what the widest type needs: {said}")
