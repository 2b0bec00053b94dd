"""A table as it is: with its numbers in few bits it is the baseline that every decomposition has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.factorizations.base import Factorization, Options, is_exporting, positive_integers
from lightning_embcompress.factorizations.quantized import Quantization, multiply, read_rows


@dataclass(frozen=True)
class FullTableOptions(Options):
    """Options of rounding to the nearest integer.

    Attributes:
        bits: Bits of a value, 2 to 8; None for the most that fit.
        group_size: Neighbouring values of a row that share a scale of 16 bits, 16 to 256.
        scale_dtype: `float16` or `bfloat16`.

    Raises:
        ValueError: If one is out of its range.
    """

    size_options: ClassVar[tuple[str, ...]] = ("bits",)

    bits: int | None = None
    group_size: int = 32
    scale_dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.quantization(2 if self.bits is None else self.bits)

    def quantization(self, bits: int) -> Quantization:
        """What these options are at a width."""
        return Quantization(bits, self.group_size, self.scale_dtype)


class FullTable(Factorization[FullTableOptions]):
    """A table with all its numbers, which can be quantized like the factors of any other method.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        dtype: Dtype of the numbers.
        device: Device of the numbers.

    Example:
        >>> table = torch.randn(1000, 64)
        >>> integers = FullTable.decompose(table, max_bytes=table.nbytes // 7)
        >>> integers.quantization.bits, integers.rows(torch.tensor([3, 999])).shape
        (4, torch.Size([2, 64]))
    """

    kind = "full_table"
    options_class = FullTableOptions

    def __init__(
        self, vocab_size: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim, dtype=dtype, device=device))

    @classmethod
    def of(cls, weight: nn.Parameter) -> Self:
        """A table that is there, without a copy."""
        table = cls(weight.shape[0], weight.shape[1], weight.dtype, torch.device("meta"))
        table.weight = weight
        return table

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is read once."""
        if is_exporting():
            return read_rows(self.weight, ids)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, read_rows(self.weight, distinct))

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        return multiply(hidden, self.weight)

    def structure(self) -> dict[str, Any]:
        """Its shape."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "dim": self.dim}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, dtype, device)

    @classmethod
    def _bytes(cls, vocab_size: int, dim: int, quantization: Quantization) -> int:
        empty = cls(vocab_size, dim, device=torch.device("meta"))
        empty.hold(quantization, "packed")
        return empty.stored_bytes()

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, options: FullTableOptions | None = None) -> int:
        """Bytes at the width asked for, or at 2 bits, see `Factorization.smallest_bytes`."""
        options = options or FullTableOptions()
        return cls._bytes(vocab_size, dim, options.quantization(options.bits or 2))

    @classmethod
    @torch.no_grad()
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: FullTableOptions | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Factorization[Any]:
        """The nearest integers of the largest width that fits, see `Factorization.decompose`.

        Raises:
            ValueError: If not even 2 bits fit.
        """
        options = options or FullTableOptions()
        vocab_size, dim = weight.shape
        widths = range(8, 1, -1) if options.bits is None else (options.bits,)
        for bits in widths:
            quantization = options.quantization(bits)
            if options.bits is not None or cls._bytes(vocab_size, dim, quantization) <= max_bytes:
                packed = cls.of(nn.Parameter(weight.detach(), requires_grad=False)).prepared(quantization).converted()
                advance(1.0)
                return packed
        raise ValueError(f"{max_bytes} bytes do not hold a table of {vocab_size} x {dim} at 2 bits")

    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: FullTableOptions | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Round the table as it is now, in place, see `Factorization.refined`."""
        assert self.quantization is not None
        rounded = self.of(nn.Parameter(target.detach(), requires_grad=False)).prepared(self.quantization).converted()
        self.load_state_dict(rounded.state_dict())
        advance(1.0)
        return self
