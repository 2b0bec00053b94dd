"""The best of several methods for every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MethodConfig, MetricConfig
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig


@dataclass(frozen=True)
class AutomaticConfig(MetricConfig):
    """For every table the one of `candidates` of the least predicted loss at equal bytes.

    Attributes:
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1, see
            `MetricConfig`.

    Raises:
        ValueError: If it is out of its range.
    """

    method: ClassVar[str] = "auto"
    description: ClassVar[str] = "For every table the method of the least predicted loss"
    needs_counts: ClassVar[bool] = True
    needs_metric: ClassVar[bool] = True

    @property
    def candidates(self) -> tuple[MethodConfig, ...]:
        """Methods that can lose the least, the one that is mostly the best first.

        Product quantization predicts the loss too, but without a transform it pays for every column alike: on trained
        tables it was never the best at any size (`docs/figures.md`), and takes the longest.
        """
        return TransformCodingConfig(), SharedBasisConfig()
