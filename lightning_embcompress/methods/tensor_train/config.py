"""What TensorGPT can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MethodConfig


@dataclass(frozen=True)
class TensorTrainConfig(MethodConfig):
    """TensorGPT: a tensor train for the vector of every token (arXiv 2307.00526).

    Attributes:
        max_rank: Largest rank of the trains, instead of a ratio.
        shape: Sizes of the modes that a vector is folded to, with a product of at least its length; None for as many
            twos as it takes, as published (768 is padded to 1,024 = 2¹⁰).

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "tensor_train"
    description: ClassVar[str] = "A tensor train for the vector of every token (TensorGPT)"
    size_fields: ClassVar[tuple[str, ...]] = ("max_rank",)

    max_rank: int | None = None
    shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank must be 1 or more, it is {self.max_rank}")
        if self.shape is not None and (not self.shape or min(self.shape) < 1):
            raise ValueError(f"shape must be sizes of 1 or more, it is {list(self.shape)}")

    def shape_for(self, dim: int) -> list[int]:
        """Sizes of the modes for vectors of a length.

        Raises:
            ValueError: If the vectors do not fit.
        """
        if self.shape is None:
            return [2] * max(1, (dim - 1).bit_length())
        if math.prod(self.shape) < dim:
            raise ValueError(
                f"shape {list(self.shape)} has a product of {math.prod(self.shape)}: it must be at least the {dim} "
                "columns of the table"
            )
        return list(self.shape)
