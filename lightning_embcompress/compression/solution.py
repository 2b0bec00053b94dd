"""Factors that were found for tables, put in their places for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import add_to_biases, bias_of, corrections_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.budget import Request
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.tables.replacement import put_back, replace_table

Solution: TypeAlias = list[tuple[Request, Factorization[Any]]]
"""What was found for every request."""


def solve_all(requests: Sequence[Request], token_counts: Tensor | None) -> Solution:
    """Find factors for all requests, and note on them how; the model is not changed.

    Args:
        requests: What is to become of which table.
        token_counts: `[vocab_size]` counts.
    """
    solved = [(request, request.solve(request.table.weight, token_counts)) for request in requests]
    for request, factors in solved:
        request.record(factors, request.table.weight, token_counts)
    return solved


def put_in_place(model: nn.Module, solved: Solution, statistics: Statistics | None) -> None:
    """Replace tables, and let the biases of heads make up for the errors where statistics say how.

    Args:
        model: The model.
        solved: Requests and what was found for them.
        statistics: Of the model, or None.
    """
    tables = [(request.table.modules, factors) for request, factors in solved]
    corrections = corrections_of(model, tables, statistics)
    for modules, factors in tables:
        replace_table(model, modules, factors)
    add_to_biases(model, corrections)


@contextmanager
def tried(model: nn.Module, solved: Solution, statistics: Statistics) -> Iterator[None]:
    """Put factors in the place of tables for a while: afterwards the model is as it was.

    Args:
        model: The model.
        solved: Requests and what was found for them.
        statistics: Of the model.
    """
    paths = [path for request, _ in solved for path in request.table.modules]
    before = {path: model.get_submodule(path) for path in paths}
    biases = {path: bias.clone() for path in paths if (bias := bias_of(model, path)) is not None}
    try:
        put_in_place(model, solved, statistics)
        yield
    finally:
        put_back(model, before)
        for path, values in biases.items():
            bias = bias_of(model, path)
            assert bias is not None
            bias.data.copy_(values)
