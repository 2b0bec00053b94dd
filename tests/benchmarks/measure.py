"""Time and memory of several ways to compute the same, in one process, and what the machine needs at least."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# What takes less is run several times in a round, but not more often than this.
_ROUND_SECONDS, _MOST_RUNS = 0.01, 100

THREADS = [count for count in (1, 2) if count <= (os.cpu_count() or 1)]


def clock() -> float:
    """Seconds, with one thread those of the processor: what others take of it does not count then."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    """Least time of several rounds, after one that warms up."""
    run()
    return min(_once(run) for _ in range(rounds))


def _once(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Let torch use so many threads for a while; by default one a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def status(field: str) -> int:
    """Bytes of this process as Linux counts them: `VmRSS`, `RssAnon`, or `VmHWM`, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class PeakMemory:
    """Most resident bytes of the process beyond those at the start of a block, on Linux; blocks must not be nested.

    The kernel keeps the mark, exactly. Without mapped files, which the system may drop when memory is short, a thread
    looks every 2 ms. Memory that was freed but that the allocator has kept is given back first, except what glibc
    cannot give back: the end of a heap that had to go on elsewhere. What a block takes of that does not count.
    """

    def __init__(self, mapped: bool = True) -> None:
        self.bytes = 0
        self._mapped = mapped
        self._field = "VmRSS" if mapped else "RssAnon"

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)
        self._start = status(self._field)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._mapped:
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._mapped:
            self.bytes = max(0, status("VmHWM") - self._start)
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, status(self._field) - self._start)
            if self._done.wait(0.002):
                return


@dataclass
class Side:
    """One way to compute something.

    Attributes:
        run: Computes it.
        leaves: Tensors that get a gradient, whose memory is not part of the peak.
        bytes: Read and written at least, gradients excepted.
        exponentials: Computed, of logits.
    """

    run: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    bytes: int = 0
    exponentials: int = 0

    def seconds(self, runs: int) -> float:
        """Mean time of some runs; results and gradients are forgotten outside of it."""
        if runs > 1:
            # What the other side has left in the caches is not this side's time.
            self.run()
            self.forget()
        total = 0.0
        for _ in range(runs):
            start = clock()
            found = self.run()
            total += clock() - start
            del found
            self.forget()
        return total / runs

    def forget(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


@dataclass
class Timing:
    """What was measured of a side.

    Attributes:
        seconds: Median over the rounds.
        ratio: Median over the rounds of the first side's time over its own: how many times faster it is.
        peak_bytes: Most memory beyond parameters and their gradients.
        flops: Operations of its products.
        bound_seconds: What the machine needs at least: for products and exponentials one after the other, or for the
            memory, whichever is more.
        exponential_seconds: The part of that for the exponentials.
    """

    seconds: float
    ratio: float
    peak_bytes: int
    flops: int
    bound_seconds: float
    exponential_seconds: float

    def __str__(self) -> str:
        bound = f", at least {self.bound_seconds * 1e3:.3g} ms" if self.bound_seconds else ""
        return (
            f"{self.seconds * 1e3:.3g} ms{bound}, {self.ratio:.2f} times as fast as the first, "
            f"{self.peak_bytes / 1e6:.1f} MB at the peak"
        )


class _Flops(TorchDispatchMode):
    """Counts the operations of products; torch's own counter sets hooks on tensors that some losses cannot have."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def in_turns(sides: Mapping[str, Side], rounds: int, thread_count: int = 1) -> dict[str, Timing]:
    """Run all sides in every round, so that what else the machine does falls on all of them, and print their times."""
    with threads(thread_count):
        works = {name: _work(side) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        rates = []
        for _ in range(rounds):
            rates.append(machine_rates())
            for name, side in sides.items():
                times[name].append(side.seconds(works[name][-1]))
    flops_rate, bytes_rate, exponentials_rate = map(statistics.median, zip(*rates, strict=True))
    first = next(iter(times.values()))
    found = {}
    for name, side in sides.items():
        flops, gradients, peak, _ = works[name]
        exponentials = side.exponentials / exponentials_rate
        found[name] = Timing(
            statistics.median(times[name]),
            statistics.median(one / other for one, other in zip(first, times[name], strict=True)),
            peak,
            flops,
            max(flops / flops_rate + exponentials, (side.bytes + gradients) / bytes_rate),
            exponentials,
        )
        print(f"\n  {name}, {thread_count} threads: {found[name]}", end="")
    print()
    return found


def _work(side: Side) -> tuple[int, int, int, int]:
    """Operations, bytes of gradients, peak memory, and how often it is to be run in a round."""
    with _Flops() as counter:
        side.run()
    gradients = sum(_gradient_bytes(leaf) for leaf in side.leaves)
    side.forget()
    alone = side.seconds(1)
    with PeakMemory() as memory:
        found = side.run()
    del found
    side.forget()
    runs = min(_MOST_RUNS, max(1, math.ceil(_ROUND_SECONDS / alone)))
    return counter.total, gradients, max(0, memory.bytes - gradients), runs


def _gradient_bytes(leaf: Tensor) -> int:
    gradient = leaf.grad
    if gradient is None:
        return 0
    parts = (gradient._values(), gradient._indices()) if gradient.is_sparse else (gradient,)
    return sum(part.nbytes for part in parts)


def machine_rates() -> tuple[float, float, float]:
    """What the machine does in a second: operations of float32 products, bytes read from memory, and exponentials."""
    square, product = torch.randn(1024, 1024), torch.empty(1024, 1024)
    large, vector = torch.ones(4096, 4096), torch.ones(4096)
    cached, result = torch.randn(2**16), torch.empty(2**16)
    # Which of the two is faster, by rows or by columns, depends on the processor.
    memory = min(seconds(lambda: large @ vector), seconds(lambda: large.T @ vector))
    return (
        2 * 1024**3 / seconds(lambda: torch.mm(square, square, out=product)),
        large.nbytes / memory,
        2**16 / seconds(lambda: torch.exp(cached, out=result), 16),
    )
