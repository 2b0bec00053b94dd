"""What GroupReduce can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_embcompress.methods.blocks import MOST_BLOCKS, check_blocks
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.group_reduce.grouping import kmeans_groups
from lightning_embcompress.methods.group_reduce.solver import equal_frequency_groups


@dataclass(frozen=True)
class GroupReduceConfig(MethodConfig):
    """GroupReduce as published: frequency groups, each of a low rank of its own (Chen et al. 2018, arXiv 1806.06950).

    Attributes:
        groups: Number of groups; None for 5 up to 30,000 words, else 20.
        refine_rounds: Most rounds of moving words between groups; 0 for none.
        move_fraction: Part of the candidates that move in a round.
        grouping: How words are grouped to begin with: groups of `equal` size, or by `kmeans` of their frequencies.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "group_reduce"
    description: ClassVar[str] = "Frequency groups, each of a low rank of its own (GroupReduce)"
    needs_counts: ClassVar[bool] = True
    keeps_floats: ClassVar[bool] = True

    groups: int | None = None
    refine_rounds: int = 5
    move_fraction: float = 0.1
    grouping: Literal["equal", "kmeans"] = "equal"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.grouping not in ("equal", "kmeans"):
            raise ValueError(f"grouping must be 'equal' or 'kmeans', it is {self.grouping!r}")
        check_blocks(self.groups, self.refine_rounds)
        if not 0 < self.move_fraction <= 1:
            raise ValueError(f"move_fraction must be above 0 and at most 1, it is {self.move_fraction}")

    def groups_for(self, vocab_size: int) -> int:
        """Number of groups of a table.

        Raises:
            ValueError: If there are too many, or the table has fewer rows.
        """
        groups = self.groups or min(5 if vocab_size <= 30_000 else 20, vocab_size)
        if groups > MOST_BLOCKS:
            raise ValueError(f"groups must be at most {MOST_BLOCKS}, it is {groups}")
        if groups > vocab_size:
            raise ValueError(f"groups must be at most the {vocab_size} rows of the table, it is {groups}")
        return groups

    def start(self, weights: Tensor) -> Tensor:
        """`[vocab_size]` group of every row to begin with."""
        groups = self.groups_for(weights.numel())
        return kmeans_groups(weights, groups) if self.grouping == "kmeans" else equal_frequency_groups(weights, groups)
