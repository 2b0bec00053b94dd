"""What the methods have in common that decompose the whole table, folded to a tensor of a few modes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_embcompress.methods.base import Factorization, is_exporting
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.tensorly.config import FoldingConfig

# Elements of what is computed on the way to the logits of some states at once: 16 MiB of float32.
_STATES_ELEMENTS = 2**22


FoldingConfigT = TypeVar("FoldingConfigT", bound=FoldingConfig)
"""The options of a method that folds the table."""


class FoldedTable(Factorization[FoldingConfigT]):
    """A table as a tensor `[I_1, …, I_m, J_1, …, J_k]`: an id is read as a number of `m` digits.

    Rows and columns beyond those of the table are padding, which is decomposed as zeros and never returned.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        vocab_shape: `I_1 … I_m`, with a product of at least `vocab_size`.
        dim_shape: `J_1 … J_k`, with a product of at least `dim`.

    Raises:
        ValueError: If a shape is not possible.
    """

    def __init__(self, vocab_size: int, dim: int, vocab_shape: Sequence[int], dim_shape: Sequence[int]) -> None:
        """Keep the shapes."""
        super().__init__(vocab_size, dim)
        for name, shape, size in (("vocab_shape", vocab_shape, vocab_size), ("dim_shape", dim_shape, dim)):
            if not shape or min(shape) < 1 or math.prod(shape) < size:
                raise ValueError(f"{name} {list(shape)} must be sizes of 1 or more with a product of at least {size}")
        self.vocab_shape = list(vocab_shape)
        self.dim_shape = list(dim_shape)

    @abstractmethod
    def _rows_of(self, ids: Tensor, distinct: bool, *factors: Tensor) -> Tensor:
        """Rows from the factors in the order of `parameters()`.

        Args:
            ids: `[count]`.
            distinct: Whether they ascend, each once; otherwise no shape may depend on their values.
            *factors: The factors.

        Returns:
            `[count, ∏ J_k]`.
        """

    @abstractmethod
    def _contracted(self, hidden: Tensor, *factors: Tensor) -> Tensor:
        """Logits without rows: `[states, J_1, …]` hidden states give `[states, ∏ I_k]`."""

    @abstractmethod
    def _costs(self) -> tuple[int, int, int]:
        """Multiplications of all rows, and those of a contraction for one state; elements that the latter makes."""

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once.

        Raises:
            IndexError: If an id is out of range.
        """
        factors = self.whole_factors(sparse)
        if is_exporting():
            rows = self._rows_of(ids.flatten().long(), False, *factors)
            return rows[:, : self.dim].reshape(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        # Sorted. The padding behind the last token would be read without a complaint.
        if distinct.numel() and (int(distinct[0]) < 0 or int(distinct[-1]) >= self.vocab_size):
            raise IndexError(
                f"ids must be from 0 to {self.vocab_size - 1}, they go from {distinct[0]} to {distinct[-1]}"
            )
        return F.embedding(inverse, self._rows_of(distinct.long(), True, *factors)[:, : self.dim])

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`: by contraction, or by rows where their cost is shared by many states."""
        factors = self.whole_factors()
        states = hidden.reshape(-1, self.dim)
        count = states.shape[0]
        rows_cost, contraction_cost, elements = self._costs()
        if not is_exporting() and count * contraction_cost > rows_cost + count * self.vocab_size * self.dim:
            return self.logits_of_rows(hidden, self._rows_between, *factors)
        if is_exporting():
            logits = self._padded_contraction(states, *factors)
        else:
            step = max(1, _STATES_ELEMENTS // elements)
            pieces = torch.split(states, step)
            if torch.is_grad_enabled():
                # What a contraction makes on its way may be many times the logits: it is made again for the gradient.
                outputs = [checkpoint(self._padded_contraction, p, *factors, use_reentrant=False) for p in pieces]
            else:
                outputs = [self._padded_contraction(piece, *factors) for piece in pieces]
            logits = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def _rows_between(self, start: int, stop: int, *factors: Tensor) -> Tensor:
        ids = torch.arange(start, stop, device=factors[0].device)
        return self._rows_of(ids, True, *factors)[:, : self.dim]

    def _padded_contraction(self, states: Tensor, *factors: Tensor) -> Tensor:
        padded = F.pad(states, (0, math.prod(self.dim_shape) - self.dim))
        return self._contracted(padded.reshape(-1, *self.dim_shape), *factors)[:, : self.vocab_size]

    def _digits(self, ids: Tensor) -> list[Tensor]:
        """Digits of ids, the one that changes slowest first."""
        tails = [math.prod(self.vocab_shape[mode + 1 :]) for mode in range(len(self.vocab_shape))]
        return [ids // tail % size for tail, size in zip(tails, self.vocab_shape, strict=True)]

    def _folded(self, weight: Tensor) -> Tensor:
        """A table of the shape as a tensor, in the dtype in which it is solved."""
        padding = (0, math.prod(self.dim_shape) - self.dim, 0, math.prod(self.vocab_shape) - self.vocab_size)
        padded = F.pad(weight.to(compute_dtype(weight.dtype)), padding)
        return padded.reshape(*self.vocab_shape, *self.dim_shape)

    def _shapes(self) -> dict[str, Any]:
        """The part of the structure that is the same for all of them."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "dim": self.dim,
            "vocab_shape": self.vocab_shape,
            "dim_shape": self.dim_shape,
        }
