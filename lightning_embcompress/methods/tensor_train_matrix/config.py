"""What the TT-matrix can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_embcompress.methods.folding import FoldingConfig


@dataclass(frozen=True)
class TensorTrainMatrixConfig(FoldingConfig):
    """The TT-matrix: one tensor train for the whole table (Hrinchuk et al. 2020).

    Attributes:
        max_rank: Largest rank of the train, instead of a ratio.
        num_cores: Number of cores, where no shape is given.
        init: `decompose` takes the cores from the table; `random` draws them so that the table has the variance it
            has now, for training from scratch.

    Raises:
        ValueError: If one is out of its range, or `vocab_shape` and `dim_shape` have not as many sizes.
    """

    method: ClassVar[str] = "tensor_train_matrix"
    description: ClassVar[str] = "One tensor train for the whole table (TT embedding)"
    size_fields: ClassVar[tuple[str, ...]] = ("max_rank",)

    max_rank: int | None = None
    num_cores: int = 3
    init: Literal["decompose", "random"] = "decompose"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("max_rank", "num_cores"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, it is {value}")
        if self.vocab_shape is not None and self.dim_shape is not None and len(self.vocab_shape) != len(self.dim_shape):
            raise ValueError(
                f"vocab_shape {list(self.vocab_shape)} and dim_shape {list(self.dim_shape)} must have as many sizes: "
                "one of each for every core"
            )
        if self.init not in ("decompose", "random"):
            raise ValueError(f"init must be 'decompose' or 'random', it is {self.init!r}")

    @property
    def num_modes(self) -> tuple[int, int]:
        """As many of both: those of the shape that is given, if there is one."""
        given = self.vocab_shape or self.dim_shape
        count = self.num_cores if given is None else len(given)
        return count, count
