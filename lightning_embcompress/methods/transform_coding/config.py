"""What transform coding can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
        codes: `lloyd`: every coefficient has the nearest level. `trellis`: those of up to 5 bits are chosen together,
            row by row, see `quantizers.trellis`; less is lost at equal bytes, and it takes longer to find.
        effort: Bits of the windows of the trellis, 6 to 12: one more takes twice as long to find.
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
    codes: Literal["lloyd", "trellis"] = "lloyd"
    effort: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, it is {self.bits}")
        if self.codes not in ("lloyd", "trellis"):
            raise ValueError(f"codes must be 'lloyd' or 'trellis', it is {self.codes!r}")
        if type(self.effort) is not int or not 6 <= self.effort <= 12:
            raise ValueError(f"effort must be from 6 to 12, it is {self.effort}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a coefficient to choose from."""
        return WIDTHS if self.bits is None else (self.bits,)

    @property
    def window(self) -> int:
        """Bits of the windows of the trellis; 0 for none."""
        return self.effort if self.codes == "trellis" else 0
