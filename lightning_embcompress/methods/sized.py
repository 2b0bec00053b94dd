"""Methods whose factors have a size of one number: the largest that fits a budget is taken."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from lightning_embcompress.methods.base import ConfigT, Factorization, Problem
from lightning_embcompress.methods.quantizers.factors import Factor, PackedFactor, pieces
from lightning_embcompress.methods.specs import stored_bytes
from lightning_embcompress.utils.graphs import is_exporting

# Elements of a piece of the table that is built on the way to the logits: 2 MiB of float32 stay in a core's cache.
_PIECE_ELEMENTS = 2**19


@dataclass(frozen=True)
class Sizes:
    """What there is to choose from.

    Attributes:
        count: How many sizes there are.
        structure: Arguments of the class, behind `vocab_size` and `dim`, for each of them from 1, the smallest.
    """

    count: int
    structure: Callable[[int], tuple[Any, ...]]


class SizedFactorization(Factorization[ConfigT], Generic[ConfigT]):
    """A factorization that is found by trying sizes: see `Factorization` for what all of them do."""

    @classmethod
    @abstractmethod
    def sizes(cls, vocab_size: int, dim: int, config: ConfigT) -> Sizes:
        """The sizes that a table can have with this config; one alone where it says which.

        Raises:
            ValueError: If an option does not fit the shape.
        """

    @abstractmethod
    def _solve(self, problem: Problem[ConfigT], refine: bool) -> None:
        """Find the factors of a table, in place; with `refine` from those there are, and close to them."""

    @classmethod
    def bytes_of(cls, vocab_size: int, dim: int, itemsize: int, *structure: Any) -> int:
        """Stored bytes of a structure: those of an empty one, which takes no memory.

        Raises:
            ValueError: If the structure is not possible.
        """
        empty = cls(vocab_size, dim, *structure, device=torch.device("meta"))  # type: ignore[call-arg]
        tensors = empty.state_dict().values()
        size = sum(one.numel() * (itemsize if one.is_floating_point() else one.element_size()) for one in tensors)
        return stored_bytes(size, len(tensors), empty.spec())

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: ConfigT | None = None) -> int:
        """Bytes at the size asked for, or at the smallest.

        Raises:
            ValueError: If an option does not fit the shape.
        """
        sizes = cls.sizes(vocab_size, dim, config or cls.config_class())
        return cls.bytes_of(vocab_size, dim, itemsize, *sizes.structure(1))

    @classmethod
    def _decompose(cls, problem: Problem[ConfigT]) -> Self:
        """The largest size that fits."""
        weight = problem.weight
        (vocab_size, dim), itemsize = weight.shape, weight.element_size()
        sizes = cls.sizes(vocab_size, dim, problem.config)
        fitting = bisect_right(
            range(1, sizes.count + 1),
            problem.max_bytes,
            key=lambda size: cls.bytes_of(vocab_size, dim, itemsize, *sizes.structure(size)),
        )
        if not fitting:
            least = cls.bytes_of(vocab_size, dim, itemsize, *sizes.structure(1))
            raise ValueError(
                f"{problem.max_bytes} bytes do not hold a table of {vocab_size} x {dim} by {cls.kind!r}: allow at "
                f"least {least}"
            )
        made = cls(vocab_size, dim, *sizes.structure(fitting), weight.dtype, weight.device)  # type: ignore[call-arg]
        made._solve(problem, refine=False)
        return made

    def logits_of_rows(
        self,
        hidden: Tensor,
        rows: Callable[..., Tensor],
        *factors: Tensor,
        by_row: Factor | None = None,
    ) -> Tensor:
        """`h Wᵀ` where rows cost less to compute than to multiply with: a piece of the table at a time.

        A piece is computed, multiplied and forgotten, and computed again in the backward pass: the table as a whole
        is never there.

        Args:
            hidden: `[*, dim]`.
            rows: Computes the rows from `start` to `stop` when called with `(start, stop, *factors)`. It must not read
                other parameters: in the backward pass they may be others.
            *factors: What it reads.
            by_row: `[vocab_size, *]`, a factor with a row for every token, of which it only gets those from `start` to
                `stop`, before the other factors: the gradient of a slice that it takes itself is as large as the whole.

        Returns:
            `[*, vocab_size]`.
        """
        # As many rows as stay in the cache, and at most a quarter of the table.
        step = min(max(1, _PIECE_ELEMENTS // self.dim), -(-self.vocab_size // 4))

        def piece(states: Tensor, start: int, *read: Tensor) -> Tensor:
            stop = min(start + step, self.vocab_size)
            if isinstance(by_row, PackedFactor):
                # Unpacked here, and again in the backward pass: it is never there as a whole.
                read = (by_row.rows(torch.arange(start, stop, device=self.device)), *read)
            return F.linear(states, rows(start, stop, *read))

        starts = list(range(0, self.vocab_size, step))
        own: list[tuple[Tensor, ...]] = [()] * len(starts)
        if by_row is not None and not isinstance(by_row, PackedFactor):
            own = [(part,) for part in pieces(by_row, step)]
        if torch.is_grad_enabled() and not is_exporting():
            outputs = [
                checkpoint(piece, hidden, start, *part, *factors, use_reentrant=False)
                for start, part in zip(starts, own, strict=True)
            ]
        else:
            outputs = [piece(hidden, start, *part, *factors) for start, part in zip(starts, own, strict=True)]
        return torch.cat(outputs, dim=-1)

    def _refine(self, problem: Problem[ConfigT]) -> Self:
        """The same size, in place."""
        self._solve(problem, refine=True)
        return self
