"""A matrix that trains as numbers and is read as what its codes would say."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.quantizers.gradients import straight_through, with_sparse_gradient


class RoundedFactor:
    """A matrix that is trained, and read by a rounding of its own, times a scale a column.

    Args:
        weight: `[n, columns]`.
        rounded: What is read in the place of some rows; the gradient goes straight through.
        scale: `[columns]`.
    """

    def __init__(self, weight: Tensor, rounded: Callable[[Tensor], Tensor], scale: Tensor) -> None:
        """Keep them."""
        self.weight, self.rounded, self.scale = weight, rounded, scale

    def _read(self, numbers: Tensor) -> Tensor:
        return straight_through(numbers, self.rounded) if numbers.numel() else numbers

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows; no others are rounded."""
        numbers = F.embedding(place.reshape(-1), self.weight, sparse=sparse)
        return self._read(numbers).view(*place.shape, len(self.scale)) * self.scale

    def materialize(self, sparse: bool = False) -> Tensor:
        """All of it."""
        weight = with_sparse_gradient(self.weight) if sparse else self.weight
        return self._read(weight) * self.scale

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, n]`, the product of `[*, columns]` with all rows."""
        return F.linear(hidden * self.scale, self._read(self.weight))
