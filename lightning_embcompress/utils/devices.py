"""Devices by name: whether they are there, the memory they have free, and what to do when it is used up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def find_device(name: str) -> torch.device:
    """The device that a person names.

    Args:
        name: ``cpu``, ``cuda``, ``mps``, or ``auto`` for a GPU if there is one, else the CPU.

    Raises:
        ValueError: If it is not there.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there))
    if not there[name]:
        backend: Any = getattr(torch.backends, name)
        built = backend.is_built()
        reason = "none is visible here" if built else f"torch {torch.__version__} was built without it"
        usable = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ValueError(f"device {name!r} is not there: {reason}; take auto or {usable}")
    return torch.device(name)


def on_cpu() -> AbstractContextManager[Any]:
    """Make tensors on the CPU, whatever the default device: a mode of torch, only where that is another one."""
    return torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        # Of what torch has taken, a part may be free again.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        # Of a container, or of a job of a batch system.
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


@contextmanager
def explaining_out_of_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Say what to lower where memory runs out, in the place of the allocator's own message.

    Args:
        device: Where the work is done.
        remedy: What to lower.

    Raises:
        ValueError: In the place of an error of any allocator.

    Example:
        >>> with explaining_out_of_memory(torch.device("cpu"), "take fewer tokens"):
        ...     raise MemoryError
        Traceback (most recent call last):
        ...
        ValueError: out of memory on 'cpu': take fewer tokens
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)):
            raise
        raise ValueError(f"out of memory on {str(device)!r}: {remedy}") from error
