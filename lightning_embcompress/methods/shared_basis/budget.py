"""What a shared basis may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_embcompress.methods.numerics.rate_allocation import Overheads


@dataclass(frozen=True)
class BitBudget:
    """What may be stored, and what it takes.

    Attributes:
        max_bits: Most bits of everything that depends on the solution.
        widths: Bits of a coefficient to choose from, ascending, without 0.
        is_exact: Whether they lose nothing: coefficients are kept as floats.
        overheads: Bits beside those of coefficients.
        block: Bits of a block: its mean.
        index: Called with the number of blocks, bits of the index that says which row is in which.
        stored_means: Called with means of blocks, `[blocks, dim]` float64, what they become when they are stored.
        window: Bits of the windows of a trellis, by which narrow coefficients are coded; 0 for none.
    """

    max_bits: int
    widths: tuple[int, ...]
    is_exact: bool
    overheads: Overheads
    block: int
    index: Callable[[int], int]
    stored_means: Callable[[Tensor], Tensor] = lambda means: means
    window: int = 0

    def left(self, blocks: int) -> float:
        """Bits that are left for coefficients and basis with so many blocks."""
        return self.max_bits - blocks * self.block - self.index(blocks)
