"""What CP and Tucker can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import balanced_shape


@dataclass(frozen=True)
class FoldingConfig(MethodConfig):
    """How a table is folded to a tensor of a few modes.

    Attributes:
        vocab_shape: Sizes of the modes of the vocabulary, whose product is at least the number of tokens; None for two
            balanced ones.
        dim_shape: Sizes of the modes of the columns, whose product is at least their number; None for one.

    Raises:
        ValueError: If a size is not positive.
    """

    vocab_shape: Sequence[int] | None = None
    dim_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("vocab_shape", "dim_shape"):
            shape = getattr(self, name)
            if shape is not None and (not shape or min(shape) < 1):
                raise ValueError(f"{name} must be sizes of 1 or more, it is {list(shape)}")

    def shapes_for(self, vocab_size: int, dim: int) -> tuple[list[int], list[int]]:
        """Sizes of the modes of a table.

        Raises:
            ValueError: If a shape that was given is too small for it.
        """
        vocab_shape = list(balanced_shape(vocab_size, 2) if self.vocab_shape is None else self.vocab_shape)
        dim_shape = [dim] if self.dim_shape is None else list(self.dim_shape)
        for name, shape, size, what in (
            ("vocab_shape", vocab_shape, vocab_size, "rows"),
            ("dim_shape", dim_shape, dim, "columns"),
        ):
            if math.prod(shape) < size:
                raise ValueError(
                    f"{name} {shape} has a product of {math.prod(shape)}: it must be at least the {size} {what} of the "
                    "table"
                )
        return vocab_shape, dim_shape


@dataclass(frozen=True)
class CPConfig(FoldingConfig):
    """CP: the folded table as a sum of outer products.

    Attributes:
        rank: Number of components, instead of a ratio.
        max_iterations: Most rounds of alternating least squares.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "cp"
    description: ClassVar[str] = "The folded table as a sum of outer products (CP), a baseline"
    size_fields: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int | None = None
    max_iterations: int = 15

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("rank", "max_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, it is {value}")


@dataclass(frozen=True)
class TuckerConfig(FoldingConfig):
    """Tucker: the folded table as a core and a factor a mode.

    Attributes:
        ranks: One for every mode, those of the vocabulary first, instead of a ratio.
        max_iterations: Most rounds of higher-order orthogonal iteration after the higher-order SVD.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "tucker"
    description: ClassVar[str] = "The folded table as a core and a factor a mode (Tucker), a baseline"
    size_fields: ClassVar[tuple[str, ...]] = ("ranks",)

    ranks: Sequence[int] | None = None
    max_iterations: int = 5

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise ValueError(f"ranks must be 1 or more, they are {list(self.ranks)}")
        if self.max_iterations < 0:
            raise ValueError(f"max_iterations must be 0 or more, it is {self.max_iterations}")
