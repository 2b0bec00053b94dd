"""Dividing a solver's work over processes: every process computes its units, all get all results.

Units never depend on how many processes there are, and what is added up is added up in a fixed order by every process
itself: one process and several find the same solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes that are sent at a time: what has to be copied for it stays small.
_PIECE_BYTES = 2**26


@dataclass
class _Division:
    """Work that all processes do together."""

    is_over: bool = False
    """Whether all know of an error, or nothing more can be exchanged."""


_current: ContextVar[_Division | None] = ContextVar("division", default=None)


def count_processes() -> int:
    """How many processes there are; 1 where `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def divided() -> Iterator[None]:
    """Let processes share the work of the solvers that are called in the block.

    All of them have to run the block with the same table and the same arguments. They leave it together: an exception
    in one of them is raised in all, see `raise_together`. Without several processes the block runs as it is.

    Raises:
        RuntimeError: If another process has failed.

    Example:
        >>> with divided():
        ...     total = torch.zeros(4)
        ...     deal([[part] for part in total], [1.0] * 4, lambda unit: total[unit].fill_(unit))
        >>> total
        tensor([0., 1., 2., 3.])
    """
    if count_processes() == 1:
        yield
        return
    division = _Division()
    token = _current.set(division)
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        if division.is_over:
            raise
        error = caught
    finally:
        _current.reset(token)
    raise_together(error)


def deal(
    results: Sequence[Sequence[Tensor]],
    costs: Sequence[float],
    compute: Callable[[int], object],
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Compute all units of a piece of work: inside `divided` every process its share, which it sends to the others.

    What is called inside a unit is not divided again.

    Args:
        results: The tensors that a unit writes, of the same shapes and dtypes in all processes; on the device of the
            table, whatever processes talk through. No other process sees anything else that a unit writes.
        costs: Cost of every unit, in any unit of measure.
        compute: Called with the number of a unit, writes its results in place.
        advance: Called with shares of the work that add up to 1.

    Raises:
        RuntimeError: If another process has failed.
    """

    def one_by_one(units: Sequence[int]) -> None:
        total = sum(costs[unit] for unit in units)
        for unit in units:
            compute(unit)
            advance(costs[unit] / total if total else 1 / len(units))
        if not units:
            advance(1.0)

    deal_lists(results, costs, one_by_one)


def deal_lists(
    results: Sequence[Sequence[Tensor]], costs: Sequence[float], compute: Callable[[Sequence[int]], object]
) -> None:
    """As `deal`, for units that are cheaper together: `compute` is called once, with all units of this process.

    What is written for a unit must not depend on which others are computed with it.
    """
    division = _current.get()
    if division is None:
        compute(range(len(costs)))
        return
    owners = owners_of(costs, count_processes())
    rank = dist.get_rank()
    token = _current.set(None)
    error: BaseException | None = None
    try:
        compute([unit for unit, owner in enumerate(owners) if owner == rank])
    except BaseException as caught:
        error = caught
    finally:
        _current.reset(token)
    # An error from here on is one of all, or leaves the processes at different places, where they cannot meet again.
    division.is_over = True
    raise_together(error)
    for tensors, owner in zip(results, owners, strict=True):
        for tensor in tensors:
            send(tensor, owner)
    division.is_over = False


def agree(*tensors: Tensor) -> None:
    """Go on with the values that the first process has, in place: for what is not the same to the last bit anywhere.

    Inside `divided` a decision that follows from such values, a rank or a choice, must be the same in all processes.
    """
    deal([tensors], [1.0], lambda _: None)


def owners_of(costs: Sequence[float], processes: int) -> list[int]:
    """Which process computes which unit: the costliest first, each to the process with the least to do so far.

    Example:
        >>> owners_of([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads = [0.0] * processes
    owners = [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        owners[unit] = min(range(processes), key=loads.__getitem__)
        loads[owners[unit]] += costs[unit]
    return owners


def raise_together(error: BaseException | None) -> None:
    """Raise in every process if any of them has an error; all have to call it.

    So that no process waits for ever for one that has given up.

    Args:
        error: The error of this process, None if it has none.

    Raises:
        BaseException: The error of this process.
        RuntimeError: If only others have one: the rank and the error of every one of them.

    Example:
        >>> raise_together(None)
        >>> raise_together(ValueError("no space left"))
        Traceback (most recent call last):
        ValueError: no space left
    """
    if count_processes() > 1:
        failed = torch.tensor([error is not None], dtype=torch.int32, device=group_device())
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if bool(failed):
            said: list[str | None] = [None] * count_processes()
            own = None if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(said, own)
            if error is None:
                errors = "; ".join(f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None)
                raise RuntimeError(f"another process has failed, so this one cannot go on: {errors}")
    if error is not None:
        raise error


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a block in which processes do not exchange anything, and raise in all if one of them fails.

    Raises:
        BaseException: The error of this process.
        RuntimeError: If only others have one, see `raise_together`.

    Example:
        >>> with failing_together():
        ...     number = int("12")
        >>> number
        12
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    raise_together(error)


def send(tensor: Tensor, owner: int) -> None:
    """Copy a tensor from one process into that of all others, in place, whatever its dtype and device.

    Args:
        tensor: Of the same shape and dtype in all processes.
        owner: Rank of the process that has the values.
    """
    if not tensor.numel():
        return
    tensor = tensor.detach()
    whole = tensor.contiguous()
    through = group_device(tensor.device)
    # As bytes: NCCL knows no 16-bit integers, and gloo not every narrow float.
    for piece in torch.split(whole.view(-1).view(torch.uint8), _PIECE_BYTES):
        sent = piece.to(through)
        dist.broadcast(sent, owner)
        if sent is not piece:
            piece.copy_(sent)
    if whole is not tensor and dist.get_rank() != owner:
        tensor.copy_(whole)


def group_device(wanted: torch.device | None = None) -> torch.device:
    """The device whose tensors processes can exchange: the one that is wanted, or the CPU, if they can."""
    wanted = wanted or torch.device("cpu")
    # Such as "cuda:nccl", or "cpu:gloo,cuda:nccl".
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if wanted.type in kinds:
        return wanted
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def sum_over_processes(counts: Tensor) -> Tensor:
    """Add up what every process has counted; all of them get the sum.

    Args:
        counts: Of the same shape and dtype in all processes, on any device.

    Returns:
        A new tensor, on the device of the counts.

    Example:
        >>> sum_over_processes(torch.tensor([3, 0, 1]))
        tensor([3, 0, 1])
    """
    if count_processes() == 1:
        return counts.detach().clone()
    total = counts.detach().to(group_device(counts.device), copy=True).contiguous()
    dist.all_reduce(total, dist.ReduceOp.SUM)
    return total.to(counts.device)
