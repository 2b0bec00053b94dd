"""How much memory a piece of work takes, seen from outside: whoever allocates it, and whatever library."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

_PROCESS = Path("/proc/self")
_MEMINFO = Path("/proc/meminfo")
# Between two looks.
_SECONDS = 0.002
# What resets the most that the kernel remembers, see proc_pid_clear_refs(5).
_RESET_PEAK = "5"


class PeakMemory:
    """Most resident bytes of the process beyond those at the start of a block, on Linux.

    The kernel remembers them, exactly, but for one block at a time: blocks must not be nested. Where it cannot be asked
    to start anew, and where mapped files do not count, a thread looks every 2 ms: what is shorter may go unseen.

    Memory that was freed before, but that the allocator has kept, is given back first: else work could use it unseen.

    Args:
        mapped: Whether pages of mapped files count, which the system may drop when memory is short.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = bytearray(64_000_000)
        >>> memory.bytes is None or memory.bytes > 60_000_000
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
        self._thread: threading.Thread | None = None
        if not (_PROCESS / "statm").is_file():
            return self
        self.bytes = 0
        self._exact = self._mapped and _forget_peak()
        self._start = self._resident()
        if not self._exact:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
        elif self.bytes is not None:
            self.bytes = max(0, _remembered_peak() - self._start)

    def _watch(self) -> None:
        assert self.bytes is not None
        while True:
            self.bytes = max(self.bytes, self._resident() - self._start)
            if self._done.wait(_SECONDS):
                return

    def _resident(self) -> int:
        _, resident, shared = map(int, (_PROCESS / "statm").read_text().split()[:3])
        return (resident if self._mapped else resident - shared) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Bytes that can be allocated without others being pushed out, on Linux; None if that is not known.

    Example:
        >>> available_memory() != 0
        True
    """
    return _kilobytes(_MEMINFO, "MemAvailable:") if _MEMINFO.is_file() else None


def _remembered_peak() -> int:
    found = _kilobytes(_PROCESS / "status", "VmHWM:")
    assert found is not None
    return found


def _forget_peak() -> bool:
    """Start anew; not every kernel can, nor lets every process."""
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return _kilobytes(_PROCESS / "status", "VmHWM:") is not None


def _kilobytes(file: Path, name: str) -> int | None:
    """A number of a file with a line for each, in bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _give_back() -> None:
    # Of glibc only.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
