"""Listeners that are told when layers of a model were replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_LISTENERS: list[Callable[[nn.Module], None]] = []


def add_listener(listener: Callable[[nn.Module], None]) -> None:
    """Call a function with the model whenever tables or weights of it have been replaced.

    Args:
        listener: Called after the replacement with the module in which layers were replaced; added once.
    """
    if listener not in _LISTENERS:
        _LISTENERS.append(listener)


def layers_replaced(model: nn.Module) -> None:
    """Tell all listeners that layers of a model were replaced."""
    for listener in _LISTENERS:
        listener(model)
