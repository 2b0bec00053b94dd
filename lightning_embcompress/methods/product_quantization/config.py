"""What product quantization can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_embcompress.methods.config import MetricConfig

# Bits of a code where none are given.
_BITS = 8


@dataclass(frozen=True)
class ProductQuantizationConfig(MetricConfig):
    """Product quantization: rows put together from the centroids of their parts.

    Attributes:
        subspaces: Parts of a row that have a code each, instead of a ratio.
        bits: Bits of a code: a subspace has `2^bits` centroids, though not more than there are tokens. None for 8, or,
            with a ratio, the most up to 8 at which the codebook takes at most half of the bytes.
        rare_bits: Bits of the codes of rare tokens, which use only the first `2^rare_bits` centroids of the same
            codebook (MGQE); None for the same as for all.
        rare_fraction: Share of the vocabulary, the least frequent, that is rare.
        max_iterations: Most iterations of k-means on a sample of the rows.
        metric_rounds: In the metric of the loss, how often every subspace makes up for the errors that the others have
            left; 0 for k-means alone.
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1, see
            `MetricConfig`.

    Raises:
        ValueError: If one is out of its range.
    """

    method: ClassVar[str] = "product_quantization"
    description: ClassVar[str] = (
        "Rows put together from the centroids of their parts (PQ, MGQE): for storage, slower to serve than dense"
    )
    needs_counts: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("subspaces",)

    subspaces: int | None = None
    bits: int | None = None
    rare_bits: int | None = None
    rare_fraction: float = 0.9
    max_iterations: int = 10
    metric_rounds: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("subspaces", "max_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, it is {value}")
        if self.metric_rounds < 0:
            raise ValueError(f"metric_rounds must be 0 or more, it is {self.metric_rounds}")
        if self.bits is not None and not 1 <= self.bits <= 15:
            raise ValueError(f"bits must be from 1 to 15, it is {self.bits}")
        most = self.bits or _BITS
        if self.rare_bits is not None and not 0 <= self.rare_bits < most:
            raise ValueError(
                f"rare_bits must be from 0 to {most - 1}, below those of other codes, it is {self.rare_bits}"
            )
        if not 0 < self.rare_fraction < 1:
            raise ValueError(f"rare_fraction must be above 0 and below 1, it is {self.rare_fraction}")

    @property
    def widths(self) -> range:
        """Bits of a code that can be chosen from, the most first."""
        most = self.bits or _BITS
        # A size that is fixed leaves nothing to choose, and bits that are given neither.
        if self.bits is not None or self.subspaces is not None:
            return range(most, most - 1, -1)
        return range(most, (self.rare_bits or 0), -1)

    def centroids(self, vocab_size: int, bits: int) -> tuple[int, int, int]:
        """Centroids of a subspace, those for rare tokens, and how many tokens are rare."""
        most = min(2**bits, vocab_size)
        rare_tokens = 0 if self.rare_bits is None else int(self.rare_fraction * vocab_size)
        return most, min(2 ** (self.rare_bits or 0), most) if rare_tokens else 0, rare_tokens
