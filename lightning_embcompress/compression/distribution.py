"""Tables solved by all processes of a group, and what the processes have to say to each other on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_embcompress.compression.budget import Request
from lightning_embcompress.methods.registry import Factorization, factorization_from_spec
from lightning_embcompress.utils.division import (
    count_processes,
    divided,
    failing_together,
    group_device,
    owners_of,
    raise_together,
    send,
)

__all__ = ["Job", "count_processes", "failing_together", "raise_together", "solve_together"]


@dataclass(frozen=True)
class Job:
    """A table to be solved: the arguments of `Request.solve`.

    Attributes:
        request: What is to become of the table.
        weight: `[vocab_size, dim]`, the table's weight or what it is to be refined to.
        token_counts: `[vocab_size]` counts.
        start: A factorization to refine instead of starting afresh.
    """

    request: Request
    weight: Tensor
    token_counts: Tensor | None = None
    start: Factorization[Any] | None = None

    def solve(self) -> Factorization[Any]:
        """Find the factors, see `Request.solve`."""
        return self.request.solve(self.weight, self.token_counts, self.start)

    @property
    def trains(self) -> bool:
        """Whether the factors are to be trained."""
        return (self.weight if self.start is None else next(self.start.parameters())).requires_grad


def solve_together(jobs: Sequence[Job], group: dist.ProcessGroup | None = None) -> list[Factorization[Any]]:
    """Find the factors of tables by all processes of a group, and note on them how they were found.

    All processes have to call it with the same jobs, and all get the same factors, bit for bit; they are those that one
    process alone finds, but for rounding. Tables of methods that divide their work are solved by all processes
    together, one after the other; those of other methods are dealt out, the largest first, one process each. The
    weighted error that is noted (`Request.record`) is computed together, too. Without several processes tables are
    solved one after the other.

    While a process solves a table that was dealt to it, others wait for it: not longer than the timeout of the group.

    Args:
        jobs: The tables.
        group: The processes; None for all there are.

    Returns:
        One factorization a job, with its `provenance`; `job.start` itself, written in place, where its structure stays.

    Raises:
        BaseException: What a solver raised in this process.
        RuntimeError: If only another process failed: its rank and its error.

    Example:
        >>> from torch import nn
        >>> from lightning_embcompress.compression.budget import plan_requests
        >>> requests = plan_requests(nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000)), "low_rank", ratio=4)
        >>> jobs = [Job(request, request.table.weight) for request in requests]
        >>> [factors.provenance["method"] for factors in solve_together(jobs)]
        ['low_rank', 'low_rank']
    """
    several = count_processes(group) > 1
    solved = _solve_by_several(jobs, group) if several else [job.solve() for job in jobs]
    for job, factors in zip(jobs, solved, strict=True):
        with divided(group):
            job.request.record(factors, job.weight, job.token_counts)
    return solved


def _solve_by_several(jobs: Sequence[Job], group: dist.ProcessGroup | None) -> list[Factorization[Any]]:
    solved: dict[int, Factorization[Any]] = {}
    # What all have solved together comes from the first: they differ by rounding at most.
    owners = dict.fromkeys(range(len(jobs)), 0)
    dealt = []
    for index, job in enumerate(jobs):
        if job.request.factorization.divides:
            with divided(group):
                solved[index] = job.solve()
        else:
            dealt.append(index)
    costs = [jobs[index].weight.numel() for index in dealt]
    owners.update(zip(dealt, owners_of(costs, count_processes(group)), strict=True))
    with failing_together(group):
        for index in dealt:
            if owners[index] == dist.get_rank(group):
                solved[index] = jobs[index].solve()
    return [_shared(job, solved.get(index), owners[index], group) for index, job in enumerate(jobs)]


def _shared(
    job: Job, solved: Factorization[Any] | None, owner: int, group: dist.ProcessGroup | None
) -> Factorization[Any]:
    """The factorization that the owner has found, in all processes; in place in all where it is in place there."""
    state: dict[str, Tensor] = {}
    structure: list[Any] = [None]
    is_owner = dist.get_rank(group) == owner
    if is_owner:
        assert solved is not None
        state = solved.state_dict()
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        structure = [(solved.spec(), solved.dtype, solved is job.start, shapes)]
    source = owner if group is None else dist.get_global_rank(group, owner)
    dist.broadcast_object_list(structure, source, group, group_device(group))
    spec, dtype, in_place, shapes = structure[0]
    device = job.start.device if in_place and job.start is not None else job.weight.device
    with failing_together(group):
        if not is_owner:
            if in_place:
                solved = job.start
            elif solved is None or solved is job.start or solved.spec() != spec:
                solved = factorization_from_spec(spec, dtype, device).requires_grad_(job.trains)
            state = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
    for tensor in state.values():
        send(tensor, owner, group)
    assert solved is not None
    with failing_together(group):
        if not is_owner:
            solved.load_state_dict(state)
    return solved
