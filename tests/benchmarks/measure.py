"""Time and memory of two sides in one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    """Least time of several rounds, after one that warms up."""
    run()
    return min(_once(run) for _ in range(rounds))


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class PeakMemory:
    """Most resident bytes beyond those at the start of the block, sampled each 2 ms (Linux).

    Args:
        mapped: Whether pages of mapped files count, which the system may drop when memory is short.
    """

    def __init__(self, mapped: bool = True) -> None:
        self._mapped = mapped

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._peak - self._start

    def _resident(self) -> int:
        _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
        return (resident if self._mapped else resident - shared) * os.sysconf("SC_PAGE_SIZE")
