"""What a machine is, and how fast its parts are: products, memory, and the exponentials that a loss waits for."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_embcompress import __version__

# A square product that is large enough for full speed, a matrix that no cache holds, and one that stays in a cache.
_SIDE, _MEMORY_SIDE, _CACHED = 1024, 2**12, 2**16
_CACHED_ROUNDS, _TRIES = 16, 3


class Rates(NamedTuple):
    """How much of each a second.

    Attributes:
        flops: Of a square float32 product.
        bytes: That are read, of a product of a large float32 matrix with a vector, by rows or by columns.
        exponentials: Of float32 numbers in the cache.
    """

    flops: float
    bytes: float
    exponentials: float


class Work(NamedTuple):
    """What something has to do at least, as far as it is known.

    Attributes:
        flops: Of float32 products; a multiplication and an addition are two.
        bytes: Read from memory or written to it.
        exponentials: Of logits.
    """

    flops: int = 0
    bytes: int = 0
    exponentials: int = 0

    def seconds(self, rates: Rates) -> float:
        """Least time: of products and exponentials one after the other, or of the memory, whichever is more.

        Example:
            >>> Work(flops=100, bytes=30, exponentials=10).seconds(Rates(flops=100.0, bytes=10.0, exponentials=10.0))
            3.0
        """
        parts = self.parts(rates)
        return max(parts["flops"] + parts["exponentials"], parts["bytes"])

    def parts(self, rates: Rates) -> dict[str, float]:
        """Least time of each."""
        return {name: getattr(self, name) / getattr(rates, name) for name in self._fields}


class Machine:
    """Measures the rates of the machine, with the threads that torch has at that time.

    Example:
        >>> rates = Machine().rates()
        >>> rates.flops > 0 and rates.bytes > 0 and rates.exponentials > 0
        True
    """

    def __init__(self) -> None:
        """Make the matrices, about 75 MB."""
        self._square, self._product = torch.randn(_SIDE, _SIDE), torch.empty(_SIDE, _SIDE)
        self._large, self._vector = torch.ones(_MEMORY_SIDE, _MEMORY_SIDE), torch.ones(_MEMORY_SIDE)
        self._cached, self._result = torch.randn(_CACHED), torch.empty(_CACHED)

    @torch.no_grad()
    def rates(self) -> Rates:
        """Measure each, the best of three."""
        product = _seconds(lambda: torch.mm(self._square, self._square, out=self._product))
        # Which of the two is faster depends on the processor.
        memory = min(_seconds(partial(torch.mv, matrix, self._vector)) for matrix in (self._large, self._large.T))
        exponential = _seconds(
            lambda: [torch.exp(self._cached, out=self._result) for _ in range(_CACHED_ROUNDS)],
        )
        return Rates(2 * _SIDE**3 / product, self._large.nbytes / memory, _CACHED_ROUNDS * _CACHED / exponential)

    def median_rates(self, rounds: int) -> Rates:
        """Measure them several times."""
        return Rates(*map(statistics.median, zip(*(self.rates() for _ in range(rounds)), strict=True)))


def machine_facts() -> dict[str, Any]:
    """What it is, and when, as JSON: `platform`, `processor`, `cores`, versions of `python` and `torch`, `date` in UTC.

    Example:
        >>> sorted(machine_facts())
        ['cores', 'date', 'lightning_embcompress', 'platform', 'processor', 'python', 'torch']
    """
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_embcompress": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    # `platform.processor` is empty, or the architecture, on many Linux systems.
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(run: Callable[[], Any]) -> float:
    """Least time of a few runs: what a machine can do is not what something else leaves of it."""
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
