"""What follows from tensors, computed once."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Kept(Generic[T]):
    """Keeps what was computed from tensors for as long as the first of them is there and none of them has changed.

    It is no part of a module, of a state dict, or of a copy of either. Changes of tensors that were made for inference
    cannot be seen, and graphs cannot look anything up: there it is computed every time.

    Example:
        >>> kept, table = Kept(), torch.zeros(3)
        >>> first = kept.of([table], lambda: table + 1)
        >>> kept.of([table], lambda: table + 1) is first
        True
        >>> _ = table.add_(1)
        >>> kept.of([table], lambda: table + 1)
        tensor([2., 2., 2.])
    """

    def __init__(self) -> None:
        """Keep nothing."""
        self._found: MutableMapping[Tensor, tuple[Any, T]] = WeakTensorKeyDictionary()

    def of(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` computes from the tensors, now or before; without a gradient, and for every mode to use."""
        if torch.compiler.is_compiling() or any(map(_is_untold, tensors)):
            return make()
        version = [(tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        found = self._found.get(tensors[0])
        if found is None or found[0] != version:
            with torch.inference_mode(mode=False), torch.no_grad():
                found = self._found[tensors[0]] = (version, make())
        return found[1]


def _is_untold(tensor: Tensor) -> bool:
    """Whether nobody can tell if a tensor has changed."""
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.is_inference()
