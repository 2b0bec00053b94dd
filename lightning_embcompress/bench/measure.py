"""Times of several ways to compute the same, in turn, so that what else the machine does falls on all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_embcompress.bench.machine import Machine, Rates, Work
from lightning_embcompress.bench.peak_memory import PeakMemory

# What is shorter is run several times a round.
_ROUND_SECONDS = 0.01
# After so long nothing is left to be prepared that would matter.
_WARM_SECONDS = 2.0
_MOST_RUNS = 100


@dataclass
class Case:
    """One way to compute something.

    Attributes:
        what: What is computed; cases of the same are compared.
        name: How.
        run: Computes it.
        parameter_bytes: Bytes of the parameters that it reads, as they are stored.
        leaves: Tensors that get a gradient, which is part of no peak.
        bytes: What is read or written at least, gradients excepted; None where nothing is known.
        exponentials: That are computed.
        flops: Of its products; None to count them while it runs.
        needs: Bytes that it takes about, gradients included: it is left out where there are fewer.
        prepare: Called once, before it is run for the first time: what that takes is not seen.
        check: Of what `run` returns, what is reported beside the times: such as `error` or `recall`.
        is_base: Whether the others are compared with it.
    """

    what: str
    name: str
    run: Callable[[], Any]
    parameter_bytes: int
    leaves: Sequence[Tensor] = ()
    bytes: int | None = None
    exponentials: int = 0
    flops: int | None = None
    needs: int = 0
    prepare: Callable[[], Any] = field(default=lambda: None)
    check: Callable[[Any], dict[str, Any]] = field(default=lambda _: {})
    is_base: bool = False


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of products: torch's own counter puts hooks on tensors that some losses cannot do with."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula: Any = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def measure(
    cases: Sequence[Case],
    machine: Machine,
    rounds: int,
    max_memory: int | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run cases in turn, and compare each with the one that is the base of the same.

    Every case is run once or more to see its work, its result and its memory, and then in every round.
    The rates of the machine are measured in every round too.

    Args:
        cases: What to run.
        machine: On which.
        rounds: How often.
        max_memory: Bytes that may be taken; cases that need more are left out, with a `note` that says so.
        advance: Called with shares of the work that add up to 1.

    Returns:
        For every case, as JSON: `what` and `name`; `seconds`, the median; `ratio`, the median of the base's time over
        its own in the same round, null without a base; `peak_bytes` beyond parameters and their gradients, null where
        it is not known; `parameter_bytes` and `gradient_bytes`; `flops`, `bytes` and `exponentials`, see `Work`;
        `bound`, the seconds that each of these takes at least, and `bound_seconds`, all together, null where nothing is
        known; `times_bound`, the median of its time over that; what its `check` gives; and `note`.
    """
    entries: list[dict[str, Any]] = []
    running: list[tuple[Case, dict[str, Any], Work, int]] = []
    share = 1 / (len(cases) * (rounds + 1))
    for case in cases:
        entry: dict[str, Any] = {"what": case.what, "name": case.name, "parameter_bytes": case.parameter_bytes}
        entries.append(entry)
        if max_memory is not None and case.needs > max_memory:
            entry["note"] = f"needs about {case.needs / 1e9:.1f} GB, {max_memory / 1e9:.1f} GB are free"
            advance(share * (rounds + 1))
            continue
        case.prepare()
        running.append((case, entry, *_first_run(case, entry)))
        advance(share)
    times: list[list[float]] = [[] for _ in running]
    rates: list[Rates] = []
    for _ in range(rounds):
        rates.append(machine.rates())
        for taken, (case, _, _, runs) in zip(times, running, strict=True):
            taken.append(_seconds(case, runs))
            advance(share)
    bases = {case.what: taken for taken, (case, *_) in zip(times, running, strict=True) if case.is_base}
    for taken, (case, entry, work, _) in zip(times, running, strict=True):
        base = bases.get(case.what)
        bounds = [work.seconds(rate) for rate in rates]
        parts = [work.parts(rate) for rate in rates]
        entry["seconds"] = statistics.median(taken)
        entry["ratio"] = None if base is None else median_ratio(base, taken)
        entry["bound"] = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
        entry["bound_seconds"] = statistics.median(bounds) or None
        entry["times_bound"] = median_ratio(taken, bounds) if min(bounds) else None
    return entries


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of what was measured in the same rounds.

    Example:
        >>> median_ratio([2.0, 8.0, 3.0], [1.0, 2.0, 1.0])
        3.0
    """
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch have so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_run(case: Case, entry: dict[str, Any]) -> tuple[Work, int]:
    """See what a case computes, in how much memory, and how often it is to be run in a round."""
    # The class has no types.
    counter: Any = _Flops()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    with PeakMemory() as memory, counter:
        found = case.run()
    alone = time.perf_counter() - start
    gradients = sum(_gradient_bytes(leaf) for leaf in case.leaves)
    entry |= case.check(found)
    del found
    _clear(case)
    if alone < _WARM_SECONDS:
        # The first run has prepared what later ones find.
        alone = _seconds(case, 1)
        with PeakMemory() as memory:
            found = case.run()
        del found
        _clear(case)
    entry["peak_bytes"] = None if memory.bytes is None else max(0, memory.bytes - gradients)
    flops = counter.total if case.flops is None else case.flops
    work = Work(flops, 0 if case.bytes is None else case.bytes + gradients, case.exponentials)
    entry |= {"gradient_bytes": gradients, **work._asdict()}
    return work, min(_MOST_RUNS, max(1, math.ceil(_ROUND_SECONDS / alone)))


def _seconds(case: Case, runs: int) -> float:
    """Mean time of some runs, the last result and the gradients of each forgotten outside of it."""
    total = 0.0
    for _ in range(runs):
        start = time.perf_counter()
        found = case.run()
        total += time.perf_counter() - start
        del found
        _clear(case)
    return total / runs


def _clear(case: Case) -> None:
    for leaf in case.leaves:
        leaf.grad = None


def _gradient_bytes(leaf: Tensor) -> int:
    gradient = leaf.grad
    if gradient is None:
        return 0
    if gradient.is_sparse:
        return gradient._values().nbytes + gradient._indices().nbytes
    return gradient.nbytes
