"""What low rank can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MethodConfig, MetricConfig


@dataclass(frozen=True)
class LowRankConfig(MethodConfig):
    """The truncated SVD of the table: every row and every direction counts the same.

    Attributes:
        rank: The rank, instead of a budget.

    Raises:
        ValueError: If the rank is not positive.
    """

    method: ClassVar[str] = "low_rank"
    description: ClassVar[str] = "Truncated SVD of the whole table"
    keeps_floats: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int | None = None

    def __post_init__(self) -> None:
        """Check the rank."""
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be 1 or more, it is {self.rank}")


@dataclass(frozen=True)
class WeightedLowRankConfig(LowRankConfig, MetricConfig):
    """The same with rows weighted by their token counts, and directions by the metric of the loss where it is known.

    Attributes:
        rank: The rank, instead of a budget.
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1, see
            `MetricConfig`.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "weighted_low_rank"
    description: ClassVar[str] = "Truncated SVD, rows weighted by frequency"
    needs_counts: ClassVar[bool] = True
