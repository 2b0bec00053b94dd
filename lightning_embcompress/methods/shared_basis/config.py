"""What a shared basis can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_embcompress.methods.blocks import check_blocks
from lightning_embcompress.methods.config import MetricConfig


@dataclass(frozen=True)
class SharedBasisConfig(MetricConfig):
    """Frequency groups in one basis of the loss, each with the leading components that are worth their bytes.

    GroupReduce in the metric of the loss: ranks follow from the marginal gain of a byte, and rows move between groups
    at the price of their bytes. Without statistics all directions count the same, and rows by their frequency.

    Attributes:
        groups: Number of groups to begin with; None or `auto` for the best of 1, 2, 4, ... 32 by the predicted loss.
        refine_rounds: Most rounds of moving rows between groups; 0 for none.
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1, see
            `MetricConfig`.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "shared_basis"
    description: ClassVar[str] = "Frequency groups in one basis of the loss, ranks by marginal gain"
    needs_counts: ClassVar[bool] = True
    weighs_by_counts: ClassVar[bool] = True
    keeps_floats: ClassVar[bool] = True
    formerly: ClassVar[str] = "group_reduce"

    groups: int | Literal["auto"] | None = None
    refine_rounds: int = 5

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_blocks(self.groups, self.refine_rounds)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a coefficient to choose from; none for floats."""
        return ()

    @property
    def window(self) -> int:
        """Bits of the windows of a trellis; 0 for none."""
        return 0
