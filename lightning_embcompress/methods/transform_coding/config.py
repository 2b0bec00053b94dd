"""What transform coding can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import WIDTHS
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig


@dataclass(frozen=True)
class TransformCodingConfig(SharedBasisConfig):
    """Frequency groups in one basis of the loss, each component at a width of its own.

    Attributes:
        groups: Number of groups to begin with; None or `auto` for the best of 1, 2, 4, ... 32 by the predicted loss.
        refine_rounds: Most rounds of moving rows between groups; 0 for none.
        bits: The one width of coefficients that are kept, 1 to 8; None for the best of 1, 2, 3, 4, 5, 6 and 8 for
            every component of every group.
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1, see
            `MetricConfig`.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "transform_coding"
    description: ClassVar[str] = "Frequency groups in one basis of the loss, each component at a width of its own"
    keeps_floats: ClassVar[bool] = False
    formerly: ClassVar[str] = ""

    bits: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, it is {self.bits}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a coefficient to choose from."""
        return WIDTHS if self.bits is None else (self.bits,)
