"""Whether a kernel runs in torch or in Triton, and what `torch.compile` leaves alone."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

VARIABLE = "EMBCOMPRESS_KERNELS"
"""Environment variable that says which kernels run.

`auto`, as if it were not set: Triton's on GPUs that have them, torch's elsewhere. `torch`: torch's everywhere.
`triton`: Triton's wherever there is one for the dtype, on other devices too, which takes Triton's interpreter
(`TRITON_INTERPRET=1`).
"""
_CHOICES = ("auto", "torch", "triton")
# Of float64 nothing is to be lost, and GPUs are slow at it.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The least compute capability of NVIDIA's GPUs that Triton is made for.
_CAPABILITY = (8, 0)

CalledT = TypeVar("CalledT", bound=Callable[..., Any])
"""A function."""

TRITON_IS_INSTALLED = find_spec("triton") is not None
"""Whether Triton can be imported; it comes with torch for CUDA on Linux."""


def takes_triton(tensor: Tensor) -> bool:
    """Whether a Triton kernel is to read a tensor.

    Not while torch traces a graph: what it compiles has kernels of its own.

    Args:
        tensor: The largest one of the computation.

    Raises:
        ValueError: If the environment variable has another value.
        ModuleNotFoundError: If it asks for Triton, which is not installed.

    Example:
        >>> takes_triton(torch.zeros(3))
        False
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in _CHOICES:
        raise ValueError(f"the environment variable {VARIABLE} must be one of {', '.join(_CHOICES)}, it is {chosen!r}")
    if chosen == "torch" or tensor.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    if chosen == "auto":
        return tensor.is_cuda and _runs_on(tensor.get_device())
    if not TRITON_IS_INSTALLED:
        raise ModuleNotFoundError(
            f"{VARIABLE}=triton needs Triton, which is not installed: pip install triton, or leave the variable out"
        )
    return True


@cache
def _runs_on(device: int) -> bool:
    """Whether Triton can compile and launch kernels for a GPU."""
    if not TRITON_IS_INSTALLED or not _has_compiler():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= _CAPABILITY


@cache
def _has_compiler() -> bool:
    """Whether there is what Triton compiles the call of a kernel with: a C compiler, and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def current_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of a tensor the current one, on which Triton launches kernels; nothing for other tensors."""
    return cast(AbstractContextManager[Any], torch.cuda.device_of(tensor))  # type: ignore[no-untyped-call]


def uncompiled(function: CalledT) -> CalledT:
    """Leave a function as it is within a model that `torch.compile` compiles: the graph ends before it."""
    return cast(CalledT, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
