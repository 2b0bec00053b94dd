"""The best of several methods for every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.product_quantization.config import ProductQuantizationConfig
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig


@dataclass(frozen=True)
class AutomaticConfig(MethodConfig):
    """For every table the one of `candidates` of the least predicted loss at equal bytes."""

    method: ClassVar[str] = "auto"
    description: ClassVar[str] = "For every table the method of the least predicted loss"
    needs_counts: ClassVar[bool] = True
    uses_metric: ClassVar[bool] = True
    needs_metric: ClassVar[bool] = True

    @property
    def candidates(self) -> tuple[MethodConfig, ...]:
        """Methods that predict the loss, the one that is mostly the best first."""
        return TransformCodingConfig(), SharedBasisConfig(), ProductQuantizationConfig()
