"""Methods whose factors have a size of one number: the largest that fits a budget is taken."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch
from typing_extensions import Self

from lightning_embcompress.methods.base import ConfigT, Factorization, Problem
from lightning_embcompress.methods.specs import stored_bytes


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

    def _refine(self, problem: Problem[ConfigT]) -> Self:
        """The same size, in place."""
        self._solve(problem, refine=True)
        return self
