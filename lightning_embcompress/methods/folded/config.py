"""What CP and Tucker can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.folding import FoldingConfig


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
