"""Factors of tables: found by one process or by several, and put in the place of the tables for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import add_to_biases, bias_of, corrections_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.tasks import Task, Tasks
from lightning_embcompress.methods.registry import Factorization, factorization_from_spec
from lightning_embcompress.tables.replacement import put_back, replace_table
from lightning_embcompress.utils.division import (
    count_processes,
    divided,
    failing_together,
    group_device,
    owners_of,
    send,
)


@dataclass(frozen=True)
class Solution:
    """What was found for tasks.

    Attributes:
        tasks: The tables.
        factors: One factorization a table.
        statistics: Of the model, where biases of heads are to make up for the errors.
    """

    tasks: tuple[Task, ...]
    factors: tuple[Factorization[Any], ...]
    statistics: Statistics | None = None

    @property
    def tables(self) -> list[tuple[tuple[str, ...], Factorization[Any]]]:
        """Paths of the modules that read a table, and what they will read."""
        return [(task.table.modules, factors) for task, factors in zip(self.tasks, self.factors, strict=True)]


def solve(tasks: Sequence[Task], together: bool = False) -> Solution:
    """Find the factors of tables, and note on them how they were found; the model is not changed.

    Several processes that call it together get the same factors, bit for bit; they are those that one process alone
    finds, but for rounding. Tables of methods that divide their work are solved by all processes together, one after
    the other; those of other methods are dealt out, the largest first, one process each. The weighted error that is
    noted (`Task.record`) is computed together, too. While a process solves a table that was dealt to it, others wait
    for it: not longer than their timeout.

    Args:
        tasks: The tables, from `plan`; the same in all processes.
        together: Whether all processes call it.

    Returns:
        One factorization a table, with its `provenance`; `task.start` itself, written in place, where its structure
        stays.

    Raises:
        BaseException: What a solver raised in this process.
        RuntimeError: If only another process failed: its rank and its error.

    Example:
        >>> from lightning_embcompress.compression.budget import Budget
        >>> from lightning_embcompress.compression.tasks import plan
        >>> from lightning_embcompress.methods.registry import get_config
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> tasks = plan(model, get_config("low_rank"), Budget(ratio=4))
        >>> [factors.provenance["method"] for factors in solve(tasks).factors]
        ['low_rank', 'low_rank']
    """
    several = together and count_processes() > 1
    found = _solve_by_several(tasks) if several else [task.solve() for task in tasks]
    with divided() if together else nullcontext():
        for task, factors in zip(tasks, found, strict=True):
            task.record(factors)
    return Solution(tuple(tasks), tuple(found), tasks.statistics if isinstance(tasks, Tasks) else None)


def put_in_place(model: nn.Module, solution: Solution) -> None:
    """Replace tables, and let the biases of heads make up for the errors where statistics say how."""
    corrections = corrections_of(model, solution.tables, solution.statistics)
    for modules, factors in solution.tables:
        replace_table(model, modules, factors)
    add_to_biases(model, corrections)


@contextmanager
def tried(model: nn.Module, solution: Solution) -> Iterator[None]:
    """Put factors in the place of tables for a while: afterwards the model is as it was."""
    paths = [path for modules, _ in solution.tables for path in modules]
    before = {path: model.get_submodule(path) for path in paths}
    biases = {path: bias.clone() for path in paths if (bias := bias_of(model, path)) is not None}
    try:
        put_in_place(model, solution)
        yield
    finally:
        put_back(model, before)
        for path, values in biases.items():
            bias = bias_of(model, path)
            assert bias is not None
            bias.data.copy_(values)


def _solve_by_several(tasks: Sequence[Task]) -> list[Factorization[Any]]:
    solved: dict[int, Factorization[Any]] = {}
    # What all have solved together comes from the first: they differ by rounding at most.
    owners = dict.fromkeys(range(len(tasks)), 0)
    dealt = []
    for index, task in enumerate(tasks):
        if task.factorization.divides:
            with divided():
                solved[index] = task.solve()
        else:
            dealt.append(index)
    costs = [tasks[index].table.weight.numel() for index in dealt]
    owners.update(zip(dealt, owners_of(costs, count_processes()), strict=True))
    with failing_together():
        for index in dealt:
            if owners[index] == dist.get_rank():
                solved[index] = tasks[index].solve()
    return [_shared(task, solved.get(index), owners[index]) for index, task in enumerate(tasks)]


def _shared(task: Task, solved: Factorization[Any] | None, owner: int) -> Factorization[Any]:
    """The factorization that the owner has found, in all processes; in place in all where it is in place there."""
    state: dict[str, Tensor] = {}
    structure: list[Any] = [None]
    is_owner = dist.get_rank() == owner
    if is_owner:
        assert solved is not None
        state = solved.state_dict()
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        structure = [(solved.spec(), solved.dtype, solved is task.start, shapes)]
    dist.broadcast_object_list(structure, owner, device=group_device())
    spec, dtype, in_place, shapes = structure[0]
    device = task.start.device if in_place and task.start is not None else task.table.weight.device
    with failing_together():
        if not is_owner:
            if in_place:
                solved = task.start
            elif solved is None or solved is task.start or solved.spec() != spec:
                solved = factorization_from_spec(spec, dtype, device).requires_grad_(task.trains)
            state = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
    for tensor in state.values():
        send(tensor, owner)
    assert solved is not None
    with failing_together():
        if not is_owner:
            solved.load_state_dict(state)
    return solved
