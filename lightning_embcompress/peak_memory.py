"""How much memory a piece of work takes, seen from outside: whoever allocates it, and whatever library."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
# Between two looks.
_SECONDS = 0.002


class PeakMemory:
    """Most resident bytes of the process beyond those at the start of a block, on Linux.

    A thread looks every 2 ms: what is shorter has to be repeated to be seen. Memory that was freed before, but that the
    allocator has kept, is given back first: else work could use it unseen.

    Args:
        mapped: Whether pages of mapped files count, which the system may drop when memory is short.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = bytearray(64_000_000)
        >>> memory.bytes is None or memory.bytes >= 0
        True
    """

    def __init__(self, mapped: bool = True) -> None:
        """Not started yet."""
        self._mapped = mapped
        self.bytes: int | None = None
        """What was found; None on other systems."""

    def __enter__(self) -> PeakMemory:
        """Start to look."""
        _give_back()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if _STATM.is_file():
            self.bytes = 0
            self._start = self._resident()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._done.set()
        if self.bytes is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self.bytes is not None
        while True:
            self.bytes = max(self.bytes, self._resident() - self._start)
            if self._done.wait(_SECONDS):
                return

    def _resident(self) -> int:
        _, resident, shared = map(int, _STATM.read_text().split()[:3])
        return (resident if self._mapped else resident - shared) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Bytes that can be allocated without others being pushed out, on Linux; None if that is not known.

    Example:
        >>> available_memory() != 0
        True
    """
    with contextlib.suppress(OSError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _give_back() -> None:
    # Of glibc only.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
