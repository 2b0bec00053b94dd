"""Methods whose factors have a size of one number: the largest that fits a budget is taken."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.methods.base import ConfigT, Factorization
from lightning_embcompress.methods.numerics.metric import Metric
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
    def _solve(
        self,
        weight: Tensor,
        token_counts: Tensor | None,
        config: ConfigT,
        advance: Callable[[float], None],
        metric: Metric | None,
        refine: bool,
    ) -> None:
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
    @torch.no_grad()
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        config: ConfigT | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Approximate a table at the largest size that fits, see `Factorization.decompose`.

        Raises:
            ValueError: If not even the smallest fits.
        """
        config = config or cls.config_class()
        (vocab_size, dim), itemsize = weight.shape, weight.element_size()
        sizes = cls.sizes(vocab_size, dim, config)
        fitting = bisect_right(
            range(1, sizes.count + 1),
            max_bytes,
            key=lambda size: cls.bytes_of(vocab_size, dim, itemsize, *sizes.structure(size)),
        )
        if not fitting:
            least = cls.bytes_of(vocab_size, dim, itemsize, *sizes.structure(1))
            raise ValueError(
                f"{max_bytes} bytes do not hold a table of {vocab_size} x {dim} by {cls.kind!r}: allow at least {least}"
            )
        made = cls(vocab_size, dim, *sizes.structure(fitting), weight.dtype, weight.device)  # type: ignore[call-arg]
        made._solve(weight, token_counts, config, advance, metric, refine=False)
        return made

    @torch.no_grad()
    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        config: ConfigT | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Solve again at the same size, in place, see `Factorization.refined`."""
        self._solve(target, token_counts, config or self.config_class(), advance, metric, refine=True)
        return self
