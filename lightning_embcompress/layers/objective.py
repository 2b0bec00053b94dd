"""What losses over a vocabulary differ in: their values and gradients at logits, a few rows of these at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX


class Objective(ABC):
    """A loss of logits, with its gradient; a weighted sum of terms, each a mean over targets.

    Args:
        targets: Ids of the true tokens, int64, shape ``[*]``, `N` in all; those of -100 have no loss and no gradient.
        weights: Of the terms.
    """

    chunk_elements: ClassVar[int] = 2**21
    """Logits that are looked at together: 8 MiB of float32 stay in the cache, and need no new memory of the system."""

    def __init__(self, targets: Tensor, weights: Sequence[float] = (1.0,)) -> None:
        """Find the targets that count."""
        flat = targets.flatten()
        self.weights = tuple(weights)
        self.scored = flat.ne(IGNORE_INDEX)
        # Any valid id does for the ignored targets, whose loss and gradient are dropped.
        self.ids = torch.where(self.scored, flat, 0)

    @abstractmethod
    def rows(self, scores: Tensor, part: slice, gradient: Tensor | None) -> Tensor:
        """Losses of some positions, and the gradient of their weighted sum.

        Args:
            scores: ``[n, vocab_size]`` logits, in float32 (float64 for float64 logits), not to be written to.
            part: The positions.
            gradient: ``[n, vocab_size]``, to be written to, in the same dtype and other memory; None for no gradient.

        Returns:
            ``[terms, n]``.
        """

    def reordered(self, storage_order: Tensor) -> Self | None:
        """The same for logits in another order; None if it cannot be.

        Args:
            storage_order: ``[vocab_size]``, where the logit of every id is.
        """
        return None

    def summed(self, logits: Tensor, gradient: Tensor | None, part: slice = slice(None)) -> Tensor:
        """Sums of all terms over some positions, and the gradient of their weighted sum.

        Args:
            logits: ``[n, vocab_size]``, without a graph.
            gradient: ``[n, vocab_size]``, is written over; it may be the logits themselves; None for no gradient.
            part: The positions.

        Returns:
            ``[terms]``, float32 (float64 for float64 logits).
        """
        scored, first = self.scored[part], part.start or 0
        rows, dtype = rows_of_chunk(logits, self.chunk_elements), compute_dtype(logits.dtype)
        shape = (min(rows, len(logits)), logits.shape[-1])
        wide = logits if logits.dtype == dtype else logits.new_empty(shape, dtype=dtype)
        buffer, apart = gradient, gradient is None
        if gradient is not None:
            # A kernel must not write over what it reads.
            apart = gradient.dtype == dtype and gradient.data_ptr() != logits.data_ptr()
            buffer = gradient if apart else logits.new_empty(shape, dtype=dtype)
        losses = torch.empty(len(self.weights), len(logits), dtype=dtype, device=logits.device)
        # Autocast would only copy what is float32 already.
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(logits), rows):
                stop = min(start + rows, len(logits))
                scores = logits[start:stop] if wide is logits else wide[: stop - start].copy_(logits[start:stop])
                values = None if buffer is None else buffer[start:stop] if apart else buffer[: stop - start]
                losses[:, start:stop] = self.rows(scores, slice(first + start, first + stop), values)
                if gradient is not None and values is not None and not apart:
                    gradient[start:stop] = values
        # Not products: an infinite logit in an ignored row must not become NaN.
        if gradient is not None:
            gradient.index_fill_(0, scored.logical_not().nonzero().flatten(), 0.0)
        return losses.masked_fill_(~scored, 0.0).sum(-1)

    def weighted(self, terms: Tensor) -> Tensor:
        """The sum of terms by their weights."""
        return torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()

    def count(self, positions: int) -> Tensor:
        """Number of targets that are not ignored.

        Raises:
            ValueError: If there are more or fewer positions than targets.
        """
        if positions != len(self.ids):
            raise ValueError(f"{positions} positions of the model need as many targets, there are {len(self.ids)}")
        return self.scored.sum()


def rows_of_chunk(logits: Tensor, elements: int) -> int:
    """How many rows of logits have so many elements; at least one."""
    return max(1, elements // max(1, logits.shape[-1]))
