"""What the TT-matrix can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import balanced_shape


@dataclass(frozen=True)
class TensorTrainMatrixConfig(MethodConfig):
    """The TT-matrix: one tensor train for the whole table (Hrinchuk et al. 2020).

    Attributes:
        max_rank: Largest rank of the train, instead of a ratio.
        num_cores: Number of cores, where no shape is given.
        vocab_shape: `I_k`, sizes whose product is at least the number of tokens; None for balanced ones.
        dim_shape: `J_k`, as many sizes whose product is at least the number of columns; None for balanced ones.
        init: `decompose` takes the cores from the table; `random` draws them so that the table has the variance it
            has now, for training from scratch.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "tensor_train_matrix"
    description: ClassVar[str] = "One tensor train for the whole table (TT embedding)"
    size_fields: ClassVar[tuple[str, ...]] = ("max_rank",)

    max_rank: int | None = None
    num_cores: int = 3
    vocab_shape: Sequence[int] | None = None
    dim_shape: Sequence[int] | None = None
    init: Literal["decompose", "random"] = "decompose"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_rank", "num_cores"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, it is {value}")
        for name in ("vocab_shape", "dim_shape"):
            value = getattr(self, name)
            if value is not None and (not value or min(value) < 1):
                raise ValueError(f"{name} must be sizes of 1 or more, it is {list(value)}")
        if self.vocab_shape is not None and self.dim_shape is not None and len(self.vocab_shape) != len(self.dim_shape):
            raise ValueError(
                f"vocab_shape {list(self.vocab_shape)} and dim_shape {list(self.dim_shape)} must have as many sizes: "
                "one of each for every core"
            )
        if self.init not in ("decompose", "random"):
            raise ValueError(f"init must be 'decompose' or 'random', it is {self.init!r}")

    def shapes_for(self, vocab_size: int, dim: int) -> tuple[list[int], list[int]]:
        """Sizes of the modes of a table.

        Raises:
            ValueError: If a shape that was given is too small for it.
        """
        given = self.vocab_shape or self.dim_shape
        count = self.num_cores if given is None else len(given)
        shapes = []
        for name, size, what in (("vocab_shape", vocab_size, "rows"), ("dim_shape", dim, "columns")):
            shape = getattr(self, name)
            shape = list(balanced_shape(size, count) if shape is None else shape)
            if math.prod(shape) < size:
                raise ValueError(
                    f"{name} {shape} has a product of {math.prod(shape)}: it must be at least the {size} {what} of the "
                    "table"
                )
            shapes.append(shape)
        return shapes[0], shapes[1]
