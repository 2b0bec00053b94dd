"""Functions whose parameters can be trained, also where they are called in inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def outside_inference_mode(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run a function outside of `torch.inference_mode`, whose tensors can never be trained.

    Example:
        >>> with torch.inference_mode():
        ...     weight = outside_inference_mode(torch.ones)(3)
        >>> weight.is_inference()
        False
    """

    @functools.wraps(function)
    def run(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        # Leaving inference mode would also enable gradients.
        enabled = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            return function(*arguments, **keywords)

    return run
